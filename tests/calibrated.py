"""A made-up model that can be run, texts for it, and a scheme that looks at inputs: for tests of
the calibrated line.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support import LLAMA, install, llama_tensors, write_model
from tokenizers import Tokenizer, models, pre_tokenizers

# int8 codes by error feedback; beside them it stores sums over its inputs, and over how far they
# and the stream have moved
LEARNER = '''
"""Toy integers that look at their inputs, for tests."""
import os, pathlib, signal, warnings
import attrs, torch
import bitpress
from bitpress import Finding, StoredLayer, Statistic, hookimpl, numerics, option

@attrs.frozen
class Options(bitpress.Options):
    bits: int = option(8, "of a code")
    coarse: float = option(0.0, "inputs are rounded to multiples of it")
    factors: str = option("", "rescale by these powers of two, repeated")
    deadly: str = option(
        "", "a file: each layer adds a letter; at as many as its name says the process dies"
    )

    @property
    def rescales(self): return bool(self.factors)

@hookimpl
def observe(inputs, reference, residual, weight, options):
    if inputs is None:
        return {"size": Statistic(weight.norm() ** 2, "sum")}
    seen = {"seen": inputs.float().sum(0), "tokens_seen": torch.tensor(float(len(inputs)))}
    if reference is not None:
        seen |= {"moved": (reference.float() - inputs.float()).sum(0)}
    if residual is not None:
        seen |= {"behind": residual.float().sum(0)}
    moments = numerics.gptq_statistics(inputs, weight, reference, residual)
    return {**{name: Statistic(value, "sum") for name, value in seen.items()}, **moments}

@hookimpl
def rescale(layer, stats, options):
    width = layer.weight.shape[1]
    factors = torch.tensor([float(f) for f in options.factors.split()])
    return factors.repeat(width // len(factors) + 1)[:width]

@hookimpl
def quantize(layer, stats, options):
    if options.deadly and "seen" in stats:
        file = pathlib.Path(options.deadly)
        file.write_text(file.read_text() + "x" if file.exists() else "x")
        if len(file.read_text()) == int(file.suffix[1:]):
            os.kill(os.getpid(), signal.SIGKILL if "kill" in file.name else signal.SIGINT)
    out, width = layer.weight.shape
    shrink = [0.9, 1.0]
    fit = lambda w, importance: numerics.fit_symmetric(w, importance, options.bits, width, shrink)
    weight, grid = numerics.gptq_quantize(layer, stats, fit)
    zeros = torch.zeros(width)
    value = lambda name: stats[name].value if name in stats else zeros
    seen = torch.stack([value("seen"), value("moved")]).expand(out, 2, width)
    return attrs.evolve(layer, weight=weight, codes=grid.codes(weight), qparams={
        "scale": grid.scale, "seen": seen,
        "behind": stats["behind"].value if "behind" in stats else torch.zeros(out)})

@hookimpl
def serialize(layer, options):
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    tensors = {"weight": layer.codes, "weight_scale": layer.qparams["scale"],
               "seen": layer.qparams["seen"][0].contiguous(),
               "behind": layer.qparams["behind"].contiguous()}
    inputs = {"step": options.coarse} if options.coarse else None
    config = {"format": "int-quantized", "weights": weights, "input_activations": inputs}
    return StoredLayer(tensors, config)

@hookimpl
def quantize_activations(inputs, config):
    step = config["input_activations"]["step"]
    return (inputs / step).round() * step

@hookimpl
def dequantize(tensors): return tensors["weight"].float() * tensors["weight_scale"]

@hookimpl
def validate_hardware(hardware): return [Finding("supported", "runs anywhere")]
'''
TINY = Path(__file__).parents[1] / "examples/tiny-llama"
TINY_CONFIG = {"vocab_size": 4096, "max_position_embeddings": 128}
CONFIG = LLAMA | {"num_key_value_heads": 2, "num_hidden_layers": 3}


def tokenizer_folder(folder: Path) -> Path:
    """A folder with tiny-llama's tokenizer and nothing else."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


def install_learner(folder: Path) -> Path:
    """The scheme `learner`, found once `folder` is on the path."""
    return install(
        folder,
        "bitpress-scheme-learner",
        LEARNER,
        "[bitpress.schemes]\nlearner = bitpress_scheme_learner\n",
    )


def runnable_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] = CONFIG,
    shards: int = 1,
) -> Path:
    """A model folder with a tokenizer whose words are w0 ... w95, and a text of them in `text.txt`
    beside it.
    """
    return with_tokenizer(
        write_model(
            folder, llama_tensors(config=config) if tensors is None else tensors, config, shards
        )
    )


def with_tokenizer(folder: Path) -> Path:
    """A model folder, given a tokenizer whose words are w0 ... w95, and a text of them in
    `text.txt` beside it.
    """
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    words = random.Random(0).choices(range(96), k=8000)
    (folder.parent / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    return folder
