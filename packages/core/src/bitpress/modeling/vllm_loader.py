"""Let the vLLM of this environment load a folder without reading a weight, and say what goes wrong.

`python -m bitpress.modeling.vllm_loader FOLDER` prints a JSON list of texts. It builds vLLM's own
model with the folder's config on the meta device, and lets vLLM's own loader place tensors of the
files' names, dtypes and shapes. Where blocks of the files draft tokens, it builds the model that
drafts too.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bitpress.checkpoint.reader import DTYPES, open_checkpoint
from bitpress.planning import draft_blocks

# The environment that vLLM wants when it is imported: one process, nothing fetched or reported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "VLLM_NO_USAGE_STATS": "1",
}

# Parameters that vLLM makes and fills itself: for the cache of keys and values.
CACHE_PARAMETER = re.compile(r"\.(k|v|q|prob)_(scale|zero_point)$")

# Texts at most: layers of one kind go wrong alike.
MAX_FAULTS = 20

# Tokens of a sequence: few, for which little memory is reserved.
MAX_TOKENS = 128

# A part of a parameter that is loaded by itself: arguments of a weight loader.
Shard = tuple[Any, ...]


def find_load_faults(folder: Path) -> list[str]:
    """What is wrong with a folder in the eyes of vLLM's loader: an error that it raises, tensors
    that no parameter takes, parameters that no tensor fills.
    """
    checkpoint = open_checkpoint(folder)
    tensors = {
        name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        for name, entry in checkpoint.entries.items()
    }
    has_drafts = draft_blocks.has_drafts(tensors, checkpoint.model_config.num_layers)
    try:
        engine_config = make_engine_config(folder, drafts=has_drafts)
        with in_one_process(engine_config):
            faults = _place(build_model(engine_config), tensors)
            if engine_config.speculative_config is not None:
                faults += _place_drafts(engine_config, tensors)
            return faults[:MAX_FAULTS]
    except Exception as e:
        # Whatever vLLM raises: it is what a user would meet.
        return [f"vLLM: {type(e).__name__}: {' '.join(str(e).split())[:300]}"]


def _place_drafts(engine_config: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    try:
        model = build_model(engine_config, of_drafts=True)
    except NotImplementedError:
        # vLLM has no such class for this machine's device, on which it then reads no drafts.
        return []
    return _place(model, tensors)


def _place(model: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Let a model's loader place tensors; the parameters that are not filled."""
    loads, writes = _watch(model), _Writes()
    device = next(model.parameters()).device
    with writes:
        model.load_weights((name, _on(device, tensor)) for name, tensor in tensors.items())
    return _unfilled(model, loads, writes)


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, with some numbers where a class computes with them."""
    return tensor if device.type == "meta" else torch.zeros_like(tensor, device=device)


def make_engine_config(folder: Path, *, drafts: bool = False) -> Any:
    """VLLM's config of a model folder, which needs no device.

    Args:
        drafts: whether the model's own blocks draft tokens, if vLLM has a class for them.
    """
    from vllm.config import SpeculativeConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import registry

    # Without a device to reserve memory on, and without a process that asks each class.
    torch.accelerator.empty_cache = lambda: None
    if not torch.cuda.is_available():
        # What vLLM's own runner for CPUs replaces too.
        torch.cuda.Event = object  # type: ignore[misc,assignment]
    registry._LazyRegisteredModel.inspect_model_cls = lambda self: (
        registry._ModelInfo.from_model_cls(self.load_model_cls())
    )
    arguments = EngineArgs(
        model=str(folder),
        dtype="bfloat16",
        enforce_eager=True,
        max_num_seqs=2,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        load_format="dummy",
    )
    # vLLM refuses more than a model has, whatever key of the config says so.
    longest = arguments.create_model_config().max_model_len
    arguments.max_model_len = min(MAX_TOKENS, longest)
    engine_config = arguments.create_engine_config()
    if not drafts:
        return engine_config
    of_drafts = SpeculativeConfig.hf_config_override(
        copy.deepcopy(engine_config.model_config.hf_config)
    )
    if getattr(of_drafts, "n_predict", None):
        arguments.speculative_config = {"method": "mtp", "num_speculative_tokens": 1}
    return arguments.create_engine_config()


@contextlib.contextmanager
def in_one_process(engine_config: Any) -> Iterator[None]:
    """The context in which vLLM builds a model on one device."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.v1.worker.workspace import init_workspace_manager

    with set_current_vllm_config(engine_config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
        init_workspace_manager(torch.device("cpu"))
        initialize_model_parallel(1, 1)
        yield


def build_model(
    engine_config: Any, prepare: Callable[[], None] = lambda: None, *, of_drafts: bool = False
) -> Any:
    """VLLM's model on the meta device, or, where its class computes meanwhile, on the CPU.

    Args:
        prepare: is called before each of these is tried.
        of_drafts: whether it is the model that drafts.
    """
    from vllm.model_executor.model_loader.utils import initialize_model

    speculative = engine_config.speculative_config
    model_config = speculative.draft_model_config if of_drafts else engine_config.model_config

    for device in ("meta", "cpu"):
        engine_config.compilation_config.static_forward_context.clear()
        prepare()
        try:
            with torch.device(device):
                return initialize_model(vllm_config=engine_config, model_config=model_config)
        except (NotImplementedError, RuntimeError) as e:
            if "meta" not in str(e) or device == "cpu":
                raise
    raise AssertionError


def set_weight_loader(parameter: Any, load: Callable[..., Any]) -> None:
    """Let vLLM fill a parameter by a function."""
    try:
        parameter.weight_loader = load
    except AttributeError:
        # Where it is a property.
        parameter._weight_loader = load


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes into which memory tensors are copied: some classes fill parameters without a loader."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.copy_.default:
            self._storages.add(args[0].untyped_storage()._cdata)
        return function(*args, **(kwargs or {}))

    def have_filled(self, parameter: torch.Tensor) -> bool:
        """Whether something was copied into a parameter."""
        return parameter.untyped_storage()._cdata in self._storages


def _watch(model: nn.Module) -> dict[str, set[Shard]]:
    """Let every parameter note which of its parts have been loaded."""
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    loads: dict[str, set[Shard]] = defaultdict(set)
    for name, parameter in model.named_parameters():
        load = getattr(parameter, "weight_loader", default_weight_loader)
        set_weight_loader(parameter, _watched(load, loads[name]))
    return loads


def _watched(load: Callable[..., Any], shards: set[Shard]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        values = [*args[2:], *(v for k, v in kwargs.items() if k not in ("param", "loaded_weight"))]
        try:
            result = load(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as e:
            # A loader that looks at numbers, which tensors without data do not have.
            if "meta" not in str(e):
                raise
            result = True
        part = tuple(value for value in values if isinstance(value, int | str))
        tensor: torch.Tensor = kwargs["loaded_weight"] if "loaded_weight" in kwargs else args[1]
        # One tensor may hold all experts.
        numbers = range(len(tensor)) if tensor.dim() == 3 else ()
        shards.update([(number, *part) for number in numbers] or [part])
        return result

    return watched


def _unfilled(model: nn.Module, loads: dict[str, set[Shard]], writes: _Writes) -> list[str]:
    """Parameters of which a part was not loaded."""
    texts = []
    for name, shards in loads.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if CACHE_PARAMETER.search(name) or _is_unused(module, name):
            continue
        expected = _num_parts(module, name)
        if not shards and not writes.have_filled(model.get_parameter(name)):
            texts.append(f"vLLM: no tensor of the files fills {name}")
        elif shards and () not in shards and len(shards) < expected:
            texts.append(f"vLLM: {len(shards)} of the {expected} parts of {name} are in the files")
    return texts


def _is_unused(module: nn.Module, name: str) -> bool:
    """Whether a parameter is a scale of inputs that experts take in 16 bits: vLLM makes it for all
    experts in NVFP4.
    """
    takes_16_bits = getattr(getattr(module, "quant_method", None), "use_a16", False)
    return bool(takes_16_bits) and name.endswith("_input_global_scale")


def _num_parts(module: nn.Module, name: str) -> int:
    """How many loads fill a parameter: one for each layer that it is stacked of."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    if isinstance(module, RoutedExperts):
        leaf = name.rpartition(".")[2]
        return int(module.local_num_experts) * (2 if leaf.startswith("w13") else 1)
    if isinstance(module, QKVParallelLinear):
        return 3
    return len(module.output_sizes) if isinstance(module, MergedColumnParallelLinear) else 1


if __name__ == "__main__":
    print(json.dumps(find_load_faults(Path(sys.argv[1]))))
