"""What several test folders need: made-up checkpoints, the command as users run it, and plugins
installed for one test.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitpress.cli import main
from bitpress.schemes.registry import discover

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

# A whole scheme in few lines: int8 codes, a float32 scale per row; `row_block` rows share it where
# the option says so.
TOY = '''
"""Toy integers, for tests."""
import attrs
import bitpress
from bitpress import Finding, StoredLayer, ShapeError, hookimpl, option

@attrs.frozen
class Options(bitpress.Options):
    levels: int = option(127, "the largest code")
    multiple: int = option(1, "what the width must be a multiple of")
    @property
    def bits(self): return 8

@hookimpl
def quantize(layer, options):
    if layer.weight.shape[1] % options.multiple:
        width = layer.weight.shape[1]
        raise ShapeError(f"width {width} is not a multiple of {options.multiple}; try multiple=1")
    scale = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / options.levels
    codes = (layer.weight / scale).round()
    return attrs.evolve(layer, weight=codes * scale, codes=codes.char(), qparams={"scale": scale})

@hookimpl
def serialize(layer, options):
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    tensors = {"weight": layer.codes, "weight_scale": layer.qparams["scale"]}
    return StoredLayer(tensors, {"format": "int-quantized", "weights": weights})

@hookimpl
def dequantize(tensors): return tensors["weight"].float() * tensors["weight_scale"]

@hookimpl
def error_bound(tensors): return tensors["weight_scale"] * 0.501

@hookimpl
def validate_hardware(hardware): return [Finding("supported", "runs anywhere")]
'''

# The toy scheme, which sends its own process a signal at the stack that a file beside it names,
# once the file is there.
DEADLY = (
    (
        TOY.replace("import attrs\n", "import attrs, os, pathlib\n")
        .replace(
            "def quantize(layer, options):\n",
            "def quantize(layer, options):\n    die_at(layer.name)\n",
        )
        .replace(
            "def dequantize(tensors): return",
            "def dequantize(tensors):\n    die_at('restore')\n    return",
        )
    )
    + """
def die_at(place):
    order = pathlib.Path(__file__).with_name("die")
    where, number = order.read_text().split("|") if order.exists() else ("", 0)
    if place == where:
        os.kill(os.getpid(), int(number))
"""
)


def llama_tensors(seed: int = 0, config: Mapping[str, Any] = LLAMA) -> dict[str, torch.Tensor]:
    """Made-up weights of a Llama of that config, by name, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    hidden, wide, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    tensors = {
        "model.embed_tokens.weight": matrix(config["vocab_size"], hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name, rows, columns in (
            ("self_attn.q_proj", queries, hidden),
            ("self_attn.k_proj", keys, hidden),
            ("self_attn.v_proj", keys, hidden),
            ("self_attn.o_proj", hidden, queries),
            ("mlp.gate_proj", wide, hidden),
            ("mlp.up_proj", wide, hidden),
            ("mlp.down_proj", hidden, wide),
        ):
            tensors[f"{block}.{name}.weight"] = matrix(rows, columns)
        tensors[f"{block}.input_layernorm.weight"] = torch.ones(hidden).bfloat16()
        tensors[f"{block}.post_attention_layernorm.weight"] = torch.ones(hidden).bfloat16()
    return tensors


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] = LLAMA,
    shards: int = 1,
) -> Path:
    """A model folder; with several shards, tensors are dealt out in turn, so that fused layers lie
    in different files.
    """
    folder.mkdir(parents=True)
    tensors = dict(llama_tensors(config=config) if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"made": "up"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file(
            {t: tensors[t] for t, n in places.items() if n == name},
            folder / name,
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    return {
        f.relative_to(folder).as_posix(): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


def sign(out: Path, note: dict[str, Any]) -> None:
    """Write a manifest whose own digest agrees with it."""
    unsigned = json.dumps({**note, "sha256": "0" * 64})
    (out / "bitpress.json").write_text(
        unsigned.replace("0" * 64, hashlib.sha256(unsigned.encode()).hexdigest())
    )


def install(
    folder: Path,
    name: str,
    module: str,
    entry_points: str,
    version: str = "1.0",
    requires: Sequence[str] = (),
) -> Path:
    """A distribution `name` with one module of the same name (dashes as underscores), found once
    `folder` is on the path.
    """
    folder.mkdir(exist_ok=True)
    (folder / f"{name.replace('-', '_')}.py").write_text(module)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    wanted = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{wanted}"
    )
    (info / "entry_points.txt").write_text(entry_points)
    return folder


def install_toy(folder: Path) -> Path:
    """The scheme `toy`, found once `folder` is on the path."""
    return install(
        folder,
        "bitpress-scheme-toy",
        TOY,
        "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n",
    )


def install_deadly(folder: Path) -> Path:
    """The scheme `toy`, which dies where the file `die` beside it says: "STACK|SIGNAL"."""
    return install(
        folder,
        "bitpress-scheme-toy",
        DEADLY,
        "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n",
    )


@contextlib.contextmanager
def plugins(folder: Path | None) -> Iterator[None]:
    """Inside the block this process finds the plugins of a folder, as a new process with the folder
    on its path would.
    """
    before, path = set(sys.modules), list(sys.path)
    if folder is not None:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    discover.cache_clear()
    try:
        yield
    finally:
        sys.path[:] = path
        discover.cache_clear()
        for name in set(sys.modules) - before:
            if folder is not None and str(getattr(sys.modules[name], "__file__", None)).startswith(
                str(folder)
            ):
                del sys.modules[name]


def command(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command run in this process, which saves the start of another: what it prints, and its
    exit code.
    """
    words, out, err = ["bitpress", *map(str, arguments)], io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with (
        plugins(path),
        patch.object(sys, "argv", words),
        streams[0],
        streams[1],
        pytest.raises(SystemExit) as end,
    ):
        main()
    return subprocess.CompletedProcess(
        words, int(str(end.value.code)), out.getvalue(), err.getvalue()
    )


def kit(
    folder: Path, *arguments: str, where: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The conformance kit on a scheme of a folder of plugins, as its author runs it, but in this
    process: it imports torch once.

    Args:
        where: the author's folder, whose pytest settings count; without it, `bitpress.conformance`
            is run with none.
    """
    words = ["-p", "no:cacheprovider", "-q", "-ra"]
    words += (
        ["--rootdir", str(where)]
        if where
        else ["-c", os.devnull, "--pyargs", "bitpress.conformance"]
    )
    out = io.StringIO()
    with (
        plugins(folder),
        contextlib.chdir(where or folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        code = pytest.main([*words, *arguments])
    return subprocess.CompletedProcess(
        ["pytest", *words, *arguments], int(code), out.getvalue(), ""
    )


def process(
    *arguments: object, path: Path | None = None, launcher: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """The command as users start it, running; `path` is a folder of plugins, `launcher` what starts
    it in Python's place.
    """
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(path), os.environ.get("PYTHONPATH")])
        )
    words = [sys.executable, *launcher, "-m", "bitpress", *map(str, arguments)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def torchrun(
    count: int, *arguments: object, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in so many processes, which torchrun starts and looks after."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    running = process(*arguments, path=path, launcher=launcher)
    out, err = running.communicate(timeout=600)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def bitpress(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as users run it, in a process of its own."""
    running = process(*arguments, path=path)
    out, err = running.communicate(timeout=300)
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


@contextlib.contextmanager
def memory_taken() -> Iterator[list[int]]:
    """A list that holds, after the block, by how many bytes this process grew at most inside it."""

    def read(key: str) -> int:
        return next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").open()
            if line.startswith(key)
        )

    # the peak is counted from now on
    Path("/proc/self/clear_refs").write_text("5")
    before, taken = read("VmRSS:"), list[int]()
    yield taken
    taken.append(read("VmHWM:") - before)


def refusal(*arguments: object, path: Path | None = None) -> str:
    """The one line with which the command refuses: exit code 2, nothing on standard output, no
    traceback.
    """
    found = command(*arguments, path=path)
    lines = [line for line in found.stderr.splitlines() if not line.startswith("warning: ")]
    assert found.returncode == 2, (found.returncode, found.stderr)
    assert found.stdout == ""
    assert len(lines) == 1, found.stderr
    assert lines[0].startswith("bitpress: ")
    return lines[0]
