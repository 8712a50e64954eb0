"""Hold what the commands write to what they wrote before, byte by byte, while the code is changed.

    python tools/written_bytes.py write FILE.json       (with the code as it was)
    python tools/written_bytes.py compare FILE.json     (with the code as it is)

Every case is a command line of the bitpress that this Python has installed, on a tiny model.
`--only PATTERN` takes the cases whose names match; `write` then leaves the others in FILE.json as
they are. Plan digests in shards depend on versions of packages: a file that differs there alone is
told, and is no failure. Of all else `compare` exits 1. Bytes depend on the CPU and on torch, so
that FILE.json is of use on the machine that wrote it, and is not committed. A run takes a quarter
of an hour on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

TINY = Path(__file__).parents[1] / "examples/tiny-llama"
SMALL = "--samples 8 --sequence-length 128 --threads 1"
ONLY_PLAN = "only the plan digest"
PLAN = re.compile(rb'("bitpress": ?")[0-9a-f]{64}"')
RECIPE = """
[[layers]]
match = "*.layers.0.mlp.down_proj"
steps = []
[[layers]]
match = "*.layers.1.*"
steps = [{ use = "fp8", weights = "tensor" }]
[[layers]]
match = "*.self_attn.*"
steps = ["fp8"]
[[layers]]
match = ["*.gate_proj", "*.up_proj"]
steps = [{ use = "w4a16", group_size = 32 }]
[[layers]]
match = "*"
steps = ["sparse-2of4", "int8"]
"""


@dataclass(frozen=True)
class Case:
    """A command line, and what it is run on.

    Attributes:
        arguments: beside the folders and SMALL.
        model: the source's folder.
        first: arguments of a compression whose output takes the model's place.
        command: `compress`, `decompress` or `search`; `none` looks at the model itself.
    """

    arguments: str
    model: str = "tiny-llama"
    first: str = ""
    command: str = "compress"


@dataclass(frozen=True)
class Digests:
    """SHA-256 of a file as it is, and of the same with zeros for the plan digest."""

    whole: str
    but_plan: str


Files = Mapping[str, Digests]

CASES: Mapping[str, Case] = {
    "fp8": Case("--scheme fp8"),
    "fp8-tensor": Case("--scheme fp8 --set weights=tensor"),
    "fp8-static": Case("--scheme fp8 --set activations=static"),
    "fp8-percentile": Case("--scheme fp8 --set activations=static --set outliers=percentile"),
    "fp8-mse": Case("--scheme fp8 --set activations=static --set outliers=mse"),
    "fp8-block": Case("--scheme fp8-block"),
    "int8": Case("--scheme int8"),
    "int8-rtn": Case("--scheme int8 --set algorithm=rtn"),
    "int8-tensor": Case("--scheme int8 --set weights=tensor"),
    "int8-static": Case("--scheme int8 --set activations=static"),
    "int8-mse": Case("--scheme int8 --set activations=static --set outliers=mse"),
    "int8-asymmetric": Case("--scheme int8 --set symmetric_activations=false"),
    "int8-static-asymmetric": Case(
        "--scheme int8 --set activations=static --set symmetric_activations=false"
    ),
    "int8-smoothing": Case("--scheme int8 --set smoothing=0.5"),
    "int8-unsmoothed": Case("--scheme int8 --set smoothing=0"),
    "int8-rtn-smoothing": Case("--scheme int8 --set algorithm=rtn --set smoothing=0.5"),
    "w4a16": Case("--scheme w4a16"),
    "w4a16-seed": Case("--scheme w4a16 --seed 3"),
    # a little less than its hidden states take: they go to disk
    "w4a16-spilled": Case("--scheme w4a16 --max-memory 661MB"),
    "w4a16-32": Case("--scheme w4a16 --set group_size=32"),
    "w4a16-channel": Case("--scheme w4a16 --set group_size=channel"),
    "w4a16-auto": Case("--scheme w4a16 --set group_size=auto"),
    "w4a16-asymmetric": Case("--scheme w4a16 --set symmetric=false"),
    "w4a16-fp8": Case("--scheme w4a16 --set activations=fp8"),
    "w4a16-int8": Case("--scheme w4a16 --set activations=int8"),
    "w4a16-awq": Case("--scheme w4a16 --set algorithm=awq"),
    "w4a16-awq-asymmetric": Case("--scheme w4a16 --set algorithm=awq --set symmetric=false"),
    "w4a16-rtn": Case("--scheme w4a16 --set algorithm=rtn"),
    "w4a16-rtn-32": Case("--scheme w4a16 --set algorithm=rtn --set group_size=32"),
    "w4a16-rtn-channel": Case("--scheme w4a16 --set algorithm=rtn --set group_size=channel"),
    "w4a16-rtn-auto": Case("--scheme w4a16 --set algorithm=rtn --set group_size=auto"),
    "w4a16-rtn-asymmetric": Case("--scheme w4a16 --set algorithm=rtn --set symmetric=false"),
    "w8a16": Case("--scheme w8a16"),
    "w8a16-asymmetric": Case("--scheme w8a16 --set symmetric=false --set group_size=channel"),
    "w8a16-gptq": Case("--scheme w8a16 --set algorithm=gptq"),
    "w8a16-awq": Case("--scheme w8a16 --set algorithm=awq"),
    "w8a16-int16": Case("--scheme w8a16 --set activations=int16"),
    "nvfp4": Case("--scheme nvfp4"),
    "nvfp4-rtn": Case("--scheme nvfp4 --set algorithm=rtn"),
    "nvfp4-float": Case("--scheme nvfp4 --set activations=float"),
    "nvfp4-rtn-float": Case("--scheme nvfp4 --set algorithm=rtn --set activations=float"),
    "mxfp4": Case("--scheme mxfp4"),
    "mxfp4-rtn": Case("--scheme mxfp4 --set algorithm=rtn"),
    "mxfp4-float": Case("--scheme mxfp4 --set activations=float"),
    "mxfp8": Case("--scheme mxfp8"),
    "mxfp8-gptq": Case("--scheme mxfp8 --set algorithm=gptq"),
    "2of4": Case("--scheme sparse-2of4"),
    "2of4-wanda": Case("--scheme sparse-2of4 --set algorithm=wanda"),
    "2of4-magnitude": Case("--scheme sparse-2of4 --set algorithm=magnitude"),
    "2of4-bitmask": Case("--scheme sparse-2of4 --set algorithm=magnitude --set layout=bitmask"),
    "2of4-gpt-bitmask": Case("--scheme sparse-2of4 --set layout=bitmask"),
    "sparse": Case("--scheme sparse"),
    "sparse-0.7": Case("--scheme sparse --set sparsity=0.7"),
    "sparse-wanda": Case("--scheme sparse --set algorithm=wanda"),
    "sparse-gpt": Case("--scheme sparse --set algorithm=sparsegpt"),
    "sparse-gpt-0.7": Case("--scheme sparse --set algorithm=sparsegpt --set sparsity=0.7"),
    "sparse-bitmask": Case("--scheme sparse --set layout=bitmask"),
    "2of4+fp8": Case("--scheme sparse-2of4+fp8"),
    "2of4+int8": Case("--scheme sparse-2of4+int8"),
    "2of4+w4a16": Case("--scheme sparse-2of4+w4a16"),
    "2of4+fp8-magnitude": Case("--scheme sparse-2of4+fp8 --set sparse-2of4.algorithm=magnitude"),
    "sparse+w4a16": Case("--scheme sparse+w4a16"),
    "sparse+w4a16-rtn": Case("--scheme sparse+w4a16 --set w4a16.algorithm=rtn"),
    "recipe": Case("--recipe mixed.toml --ignore *.layers.4.*"),
    "search": Case("--budget 5.5 --schemes nvfp4,fp8", command="search"),
    "decompress-fp8": Case("", first="--scheme fp8", command="decompress"),
    "decompress-w4a16": Case(
        "", first="--scheme w4a16 --set algorithm=rtn --set symmetric=false", command="decompress"
    ),
    "decompress-recipe": Case("", first="--recipe mixed.toml", command="decompress"),
    "of-fp8": Case("--scheme w4a16 --set algorithm=rtn", first="--scheme fp8"),
    "of-fp8-gptq": Case("--scheme w4a16", first="--scheme fp8"),
    "of-fp8-block": Case("--scheme fp8", first="--scheme fp8-block"),
    "mixture": Case("", "mixture", command="none"),
    "mixture-fp8": Case("--scheme fp8", "mixture"),
    "mixture-fp8-static": Case("--scheme fp8 --set activations=static", "mixture"),
    "mixture-fp8-block": Case("--scheme fp8-block", "mixture"),
    "mixture-int8": Case("--scheme int8", "mixture"),
    "mixture-w4a16": Case("--scheme w4a16", "mixture"),
    "mixture-w4a16-all": Case("--scheme w4a16 --all-experts", "mixture"),
    "mixture-w4a16-awq": Case("--scheme w4a16 --set algorithm=awq", "mixture"),
    "mixture-w4a16-rtn": Case("--scheme w4a16 --set algorithm=rtn", "mixture"),
    "mixture-nvfp4": Case("--scheme nvfp4", "mixture"),
    "mixture-2of4": Case("--scheme sparse-2of4", "mixture"),
    "mixture-decompress": Case("", "mixture", first="--scheme fp8", command="decompress"),
}


def main() -> None:
    """Run the cases, and write or compare what came of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("file", type=Path, help="what was written, in JSON")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases to run")
    arguments = parser.parse_args()
    names = [name for name in CASES if fnmatchcase(name, arguments.only)]
    if not names:
        parser.error(f"no case matches {arguments.only}")
    if arguments.action == "compare" and not arguments.file.exists():
        parser.error(f"{arguments.file}: write it first, with the code as it was")
    spec = importlib.util.find_spec("bitpress")
    print(f"{len(names)} cases with {spec.origin if spec else 'no bitpress'}", flush=True)
    action = write if arguments.action == "write" else compare
    sys.exit(0 if action(arguments.file, names) else 1)


def write(file: Path, names: Collection[str]) -> bool:
    """Put what the cases write into a file, beside its other cases; returns whether all ran."""
    result = {name: files for name, files in read(file).items() if name in CASES}
    result |= {name: files for name, files in carried_out(names) if files}
    table = {
        name: {path: asdict(digests) for path, digests in result[name].items()}
        for name in CASES
        if name in result
    }
    file.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{file}: {sum(map(len, table.values()))} files of {len(table)} cases")
    return all(name in result for name in names)


def read(file: Path) -> dict[str, Files]:
    """What a file says of each case; nothing where there is no file."""
    if not file.exists():
        return {}
    return {
        name: {path: Digests(**digests) for path, digests in files.items()}
        for name, files in json.loads(file.read_text()).items()
    }


def compare(file: Path, names: Collection[str]) -> bool:
    """Print what differs from a file; returns whether nothing does but plan digests."""
    before = read(file)
    equal, planned, other = 0, 0, 0
    for name, files in carried_out(names):
        recorded = before.get(name, {})
        if not files:
            other += max(len(recorded), 1)
        for path in sorted({*recorded, *files}) if files else ():
            difference = differs(recorded.get(path), files.get(path))
            equal += difference == ""
            planned += difference == ONLY_PLAN
            other += difference not in ("", ONLY_PLAN)
            if difference:
                print(f"{name}: {path}: {difference}", flush=True)
    print(f"{equal} files are equal, {planned} but for the plan digest; {other} are not")
    return other == 0


def differs(before: Digests | None, after: Digests | None) -> str:
    """In what a file differs from what it was; nothing where it is the same."""
    if before is None or after is None:
        return "was not there before" if after else "is not there"
    if before.whole == after.whole:
        return ""
    return ONLY_PLAN if before.but_plan == after.but_plan else "other bytes"


def carried_out(names: Collection[str]) -> Iterator[tuple[str, Files]]:
    """What each case writes; nothing where it fails, which is told."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(TINY, folder / "tiny-llama")
        write_mixture(folder / "mixture")
        (folder / "mixed.toml").write_text(RECIPE)
        for number, name in enumerate(names, 1):
            start = time.monotonic()
            try:
                files = written(CASES[name], folder)
                end = f"{len(files)} files"
            except subprocess.CalledProcessError as e:
                files, end = {}, f"failed: {e.stderr.strip()}"
            seconds = time.monotonic() - start
            print(f"[{number}/{len(names)}] {name}: {end}, {seconds:.1f} s", flush=True)
            yield name, files


def write_mixture(folder: Path) -> None:
    """A made-up mixture of experts in float16, several shards, with tiny-llama's tokenizer."""
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for _, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        scaled = 1 + noise / 10 if noise.dim() == 1 else noise / noise.shape[-1] ** 0.5
        weight.data = scaled.half()
    model.save_pretrained(folder, max_shard_size="1MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)


def written(case: Case, folder: Path) -> Files:
    """What a case writes, file by file; its outputs are removed."""
    first, out = folder / "first", folder / "out"
    try:
        model = case.model
        if case.first:
            bitpress(folder, f"compress {model} first {case.first} {SMALL}")
            model = "first"
        match case.command:
            case "none":
                return digests(folder / model)
            case "search":
                out.mkdir()
                bitpress(folder, f"search {model} --out out/recipe.toml {case.arguments} {SMALL}")
            case "decompress":
                bitpress(folder, f"decompress {model} out {case.arguments}")
            case command:
                bitpress(folder, f"{command} {model} out {case.arguments} {SMALL}")
        return digests(out)
    finally:
        shutil.rmtree(first, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)


def bitpress(folder: Path, words: str) -> None:
    """Run a command line in a folder, on one core, without the Hub."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        # half the time would go into compiling transformers
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(folder / "compiled"),
    }
    subprocess.run(
        [sys.executable, "-m", "bitpress", *words.split()],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )


def digests(folder: Path) -> Files:
    """Of every shard, their index, config and recipe."""
    result = {}
    for file in sorted(folder.iterdir()):
        if ".safetensors" in file.name or file.name in ("config.json", "recipe.toml"):
            data = file.read_bytes()
            # beyond the header's length stands the header, of which numbers are no part
            end = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else 0
            header = PLAN.sub(rb"\g<1>" + b"0" * 64 + b'"', data[:end])
            whole, but_plan = hashlib.sha256(data), hashlib.sha256(header + data[end:])
            result[file.name] = Digests(whole.hexdigest(), but_plan.hexdigest())
    return result


if __name__ == "__main__":
    main()
