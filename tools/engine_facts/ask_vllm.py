"""Write which layers vLLM quantizes, and under which names it asks for them.

    python tools/engine_facts/ask_vllm.py [PATTERN OF ARCHITECTURES]

Run it in an environment with vLLM and bitpress. It builds vLLM's own model classes on the meta
device, from configs alone. It lets their own loaders read the names of the files, and notes which
parameter each tensor reaches.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bitpress.checkpoint.layer_names import GATED_EXPERT, star
from bitpress.modeling import vllm_loader

# vLLM reads these when it is imported.
os.environ |= vllm_loader.ENVIRONMENT | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from stubs import install_backend, install_stubs

install_stubs()

import torch  # noqa: E402
import transformers  # noqa: E402
import vllm  # noqa: E402
from configs import (  # noqa: E402
    Json,
    build_model,
    file_tensors,
    layer_name,
    make_config,
    skip_timm,
    star_like,
    write_facts,
)
from limits import find_limits  # noqa: E402
from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: E402
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod  # noqa: E402
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E402
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    ParallelLMHead,
    VocabParallelEmbedding,
)

KINDS: tuple[tuple[type, str], ...] = (
    (LinearBase, "linear"),
    (RoutedExperts, "experts"),
    (ParallelLMHead, "head"),
    (VocabParallelEmbedding, "embedding"),
    (Attention, "attention"),
)

# Tensors with other names that a class may fail over before its facts are given up.
MAX_FAILURES = 60


class RecordingConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """A quantization config that quantizes nothing and records who asks for it.

    Some classes ask otherwise where the config is compressed-tensors'.

    Attributes:
        prefixes: the name under which a layer asks how it is quantized, by the layer's identity.
        layers: these layers, so that no other gets the identity of one.
    """

    def __init__(self) -> None:
        super().__init__(target_scheme_map={}, ignore=[], quant_format="float-quantized")
        self.prefixes: dict[int, str] = {}
        self.layers: list[torch.nn.Module] = []
        self.mapper: Any = None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.mapper = hf_to_vllm_mapper

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        self.layers.append(layer)
        self.prefixes[id(layer)] = prefix
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def rename(self, layer: str) -> str:
        """What the name of a layer becomes that a config lists: vLLM rewrites it."""
        if self.mapper is None or "." not in layer:
            return layer
        return str(self.mapper.map_name(layer) or layer)


class NamedTensor(torch.Tensor):
    """A tensor that says from which of the files' it was made."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        sources: frozenset[str] = frozenset()
        for argument in _flat(args):
            if isinstance(argument, NamedTensor):
                sources |= argument.sources
        for tensor in _flat((result,)):
            if isinstance(tensor, NamedTensor):
                tensor.sources = sources
        return result


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def ask(architecture: str) -> Json:
    """What vLLM does with the layers of an architecture's files."""
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(architecture)
        tensors = file_tensors(build_model(architecture, config))
        config.save_pretrained(folder)
        engine_config = vllm_loader.make_engine_config(Path(folder))

        def record() -> None:
            engine_config.quant_config = RecordingConfig()

        # Classes with vision read the folder while they are built.
        with vllm_loader.in_one_process(engine_config):
            model = vllm_loader.build_model(engine_config, record)
            recording = engine_config.quant_config
            readers = _load(model, tensors)
            facts = {
                name: _fact(name, readers, model, recording)
                for name, tensor in tensors.items()
                if tensor.dim() > 1
            }
            facts |= _split_experts(model, recording, tensors, facts)
    packed = getattr(model, "packed_modules_mapping", None) or {}
    layers = _join(facts)
    answer = {"model_type": config.model_type, "layers": layers}
    answer |= {"packed": dict(sorted(packed.items()))} if packed else {}
    modules = (star(layer_name(name)).rpartition(".")[0] for name in tensors)
    limits = find_limits(config.model_type, dict.fromkeys([*layers, *modules]))
    return answer | _expert_leaves(model) | ({"limits": limits} if limits else {})


def _load(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """The parameters that vLLM's loader fills from each tensor of the files, by its name.

    A name that the loader fails over is left out, and with it those that differ in numbers alone.
    """
    readers: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        vllm_loader.set_weight_loader(parameter, _recorder(name, readers))

    failed: set[str] = set()
    latest = ""

    def read() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal latest
        for name, tensor in tensors.items():
            if star(name) not in failed:
                named = tensor.as_subclass(NamedTensor)
                named.sources = frozenset([name])
                latest = name
                yield name, named

    for _ in range(MAX_FAILURES):
        try:
            model.load_weights(read())
        except Exception:
            # Whatever a class raises for a name that it does not expect.
            failed.add(star(latest))
        else:
            return {name: found for name, found in readers.items() if star(name) not in failed}
    raise LookupError("vLLM reads other names than transformers writes")


def _recorder(parameter_name: str, readers: dict[str, list[str]]) -> Callable[..., bool]:
    """A weight loader that notes from which tensors of the files a parameter is filled."""

    def load(*args: Any, **kwargs: Any) -> bool:
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, NamedTensor):
                for name in tensor.sources:
                    readers.setdefault(name, []).append(parameter_name)
        return True

    return load


def _fact(
    name: str,
    readers: Mapping[str, list[str]],
    model: torch.nn.Module,
    recording: RecordingConfig,
) -> Json | None:
    """What vLLM does with a tensor of the files: the kind of layer that it belongs to, and the name
    under which this asks how it is quantized; None where vLLM does not read it.
    """
    if name not in readers:
        return None
    # A tied weight fills several parameters: that of a layer which may be quantized counts.
    facts = [_describe(parameter, model, recording) for parameter in readers[name]]
    fact = max(facts, key=lambda fact: fact["kind"] in ("linear", "experts"))
    return fact | {"listed_as": recording.rename(layer_name(name))}


def _describe(parameter: str, model: torch.nn.Module, recording: RecordingConfig) -> Json:
    owner = parameter.rpartition(".")[0]
    module = model.get_submodule(owner)
    prefix = recording.prefixes.get(id(module))
    kind = next((kind for cls, kind in KINDS if isinstance(module, cls)), None)
    if kind == "embedding" or isinstance(module, torch.nn.Embedding):
        # A class need not pass the config and a name on to it.
        return {"kind": "embedding"} | ({"asked_as": [prefix]} if prefix else {})
    if prefix is None or kind is None:
        is_linear = isinstance(module, LinearBase | torch.nn.Linear)
        return {"kind": "never" if is_linear else "other"}
    return {"kind": kind, "asked_as": [prefix]}


def _expert_leaves(model: torch.nn.Module) -> Json:
    """What vLLM calls the layers of the first expert, by which it asks for all: gate, up, down."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            leaves = ("gate", "up", "down")
            names = [getattr(module, f"ckpt_{leaf}_proj_name") for leaf in leaves]
            return {"experts_asked_as": names}
    return {}


def _split_experts(
    model: torch.nn.Module,
    recording: RecordingConfig,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, Json | None],
) -> dict[str, Json | None]:
    """What vLLM does with the layers of single experts, where the files hold all in one tensor.

    Their possible names are tried: the first that vLLM reads into its experts count.
    """
    modules = {
        star(layer_name(name)).rpartition(".")[0]: layer_name(name).rpartition(".")[0]
        for name, tensor in tensors.items()
        if tensor.dim() == 3 and (facts.get(name) or {"kind": "experts"})["kind"] == "experts"
    }
    split: dict[str, Json | None] = {}
    for module in modules.values():
        for parent, leaves in itertools.product((module, f"{module}.experts"), GATED_EXPERT):
            names = [f"{parent}.0.{leaf}.weight" for leaf in leaves]
            matrices = {name: torch.empty(8, 8, device="meta") for name in names}
            try:
                readers = _load(model, matrices)
            except LookupError:
                continue
            answers = {name: _fact(name, readers, model, recording) for name in names}
            if all(answer and answer["kind"] == "experts" for answer in answers.values()):
                split |= answers
                break
    return split


def _join(facts: Mapping[str, Json | None]) -> Json:
    """The layers of one pattern as one: its kind, with the names that differ from the files'."""
    layers: dict[str, Json] = {}
    for name, fact in facts.items():
        if fact is None:
            continue
        layer = star(layer_name(name))
        asked_as = [star_like(layer_name(name), prefix) for prefix in fact.get("asked_as", ())]
        joined = layers.setdefault(layer, {"kind": fact["kind"], "asked_as": []})
        joined["asked_as"] += [prefix for prefix in asked_as if prefix not in joined["asked_as"]]
        joined["listed_as"] = star_like(layer_name(name), fact["listed_as"])
    return {name: _shorten(name, fact) for name, fact in sorted(layers.items())}


def _shorten(name: str, fact: Json) -> Json | str:
    """A layer's facts without what follows from its name in the files."""
    table: Json = {fact["kind"]: fact["asked_as"]}
    if len(fact["asked_as"]) == 1:
        table[fact["kind"]] = fact["asked_as"][0]
    if fact["listed_as"] != name:
        table["listed_as"] = fact["listed_as"]
    # An embedding without names is one that the engine does not look for.
    plain = [[]] if fact["kind"] == "embedding" else [[], [name]]
    is_plain = fact["asked_as"] in plain and len(table) == 1
    return str(fact["kind"]) if is_plain else table


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    skip_timm()
    install_backend()
    write_facts("vLLM", vllm.__version__.partition("+")[0], ask)
