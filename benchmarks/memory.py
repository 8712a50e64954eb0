"""Memory that `plan` says a run needs, beside what the run takes: twelve kinds of models; a table.

    python benchmarks/memory.py [--work DIR] [--only PATTERN]

Every run is given as `--max-memory` what `plan` says, and that is also the limit of a cgroup that
it runs in, where the system lets one be made (cgroups v1 and v2). The peak is that of the resident
set, shared libraries included. Models are made up, and deleted once they are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from measure import ENVIRONMENT
from models import TOKENIZER, draw
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))
from fixtures.cgroups import in_cgroup, limited_cgroup  # noqa: E402 (found by the line above)

# Planned bytes for each measured one, at most.
MAX_RATIO = 1.5

# What is said of a model where a case does not say otherwise.
DEFAULTS: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}
EXPERTS: Mapping[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


@frozen
class Case:
    """A model and a run of it.

    Attributes:
        name: of the kind of model.
        config: of the model, where it differs from `DEFAULTS`.
        recipe: options that `plan` and `compress` are given.
    """

    name: str
    config: Mapping[str, Any]
    recipe: Sequence[object]


def calibrated(*recipe: object, samples: int = 16, length: int = 512) -> Sequence[object]:
    """The options of a calibrated run."""
    size = ("--samples", samples, "--sequence-length", length)
    return (*recipe, *size, "--threads", 1)


WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
MIDDLE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_hidden_layers": 2,
}
VOCABULARY = {"vocab_size": 150_000, "num_hidden_layers": 2}
W4A16 = calibrated("--scheme", "w4a16")
CASES = (
    Case(
        "wide, data-free",
        WIDE | {"num_hidden_layers": 8},
        ("--scheme", "fp8", "--threads", 1),
    ),
    Case(
        "wide, data-free, 2 threads",
        WIDE | {"num_hidden_layers": 8},
        ("--scheme", "w4a16", "--set", "algorithm=rtn", "--threads", 2),
    ),
    Case(
        "vocabulary of 150,000, data-free",
        VOCABULARY,
        ("--scheme", "int8", "--set", "algorithm=rtn", "--threads", 1),
    ),
    Case(
        "deep (24 blocks)",
        {"num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 768},
        W4A16,
    ),
    Case("wide (5,632 inputs)", WIDE | {"num_hidden_layers": 1}, W4A16),
    Case("narrow, with 2,816 inputs", {"intermediate_size": 2816}, W4A16),
    Case("vocabulary of 150,000", VOCABULARY, W4A16),
    Case(
        "sequences of 16,384 tokens",
        {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4},
        calibrated("--scheme", "w4a16", samples=1, length=16_384),
    ),
    Case("128 experts", EXPERTS, calibrated("--scheme", "w4a16", samples=4)),
    Case("FP8 source", MIDDLE | {"quantization_config": FP8}, W4A16),
    Case("chain (2:4, then FP8)", MIDDLE, calibrated("--scheme", "sparse-2of4+fp8")),
    Case(
        "static activations (INT8)",
        MIDDLE,
        calibrated("--scheme", "int8", "--set", "activations=static"),
    ),
)


def shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a Llama or a Qwen3-MoE."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    query, key = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.self_attn.q_proj.weight", (query, hidden)
        yield f"{block}.self_attn.k_proj.weight", (key, hidden)
        yield f"{block}.self_attn.v_proj.weight", (key, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, query)
        mlps = [(f"{block}.mlp", config["intermediate_size"])]
        if "num_experts" in config:
            yield f"{block}.self_attn.q_norm.weight", (head_dim,)
            yield f"{block}.self_attn.k_norm.weight", (head_dim,)
            yield f"{block}.mlp.gate.weight", (config["num_experts"], hidden)
            width = config["moe_intermediate_size"]
            mlps = [(f"{block}.mlp.experts.{k}", width) for k in range(config["num_experts"])]
        for mlp, width in mlps:
            yield f"{mlp}.gate_proj.weight", (width, hidden)
            yield f"{mlp}.up_proj.weight", (width, hidden)
            yield f"{mlp}.down_proj.weight", (hidden, width)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def make(folder: Path, case: Case) -> None:
    """Write a case's model, with tiny-llama's tokenizer, and a text beside it."""
    config = {**DEFAULTS, **case.config}
    folder.mkdir(parents=True)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    tensors = {}
    for name, shape in shapes(config):
        weight = draw(name, shape)
        is_quantized = "quantization_config" in config and name.endswith("_proj.weight")
        if is_quantized:
            scales = [math.ceil(size / 128) for size in shape]
            tensors[f"{name}_scale_inv"] = torch.full(scales, 1e-3)
            weight = (weight.float() * 1e3).to(torch.float8_e4m3fn)
        tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    pages = "\n".join(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))
    (folder / "text.txt").write_text(4 * pages)


# A process of its own: the peak that a child reports starts at its parent's size.
LAUNCH = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - start
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, seconds]))
"""


@frozen
class Result:
    """What a case took.

    Attributes:
        planned: bytes that `plan` says.
        measured: bytes that were resident at most.
        seconds: of the run.
        fault: what became of it; empty where it ended well.
    """

    planned: int
    measured: int
    seconds: float
    fault: str


def measure(case: Case, work: Path) -> Result:
    """Make a case's model, plan the run, and run it with no more memory than planned."""
    source, out = work / "model", work / "out"
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    make(source, case)
    bitpress = [sys.executable, "-m", "bitpress"]
    words = [*bitpress, "plan", str(source), *map(str, case.recipe), "--json"]
    plan = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if plan.returncode:
        raise SystemExit(f"{case.name}: {plan.stderr}")
    planned = json.loads(plan.stdout)["memory"]

    words = [*bitpress, "compress", str(source), str(out), *map(str, case.recipe)]
    words += ["--max-memory", f"{planned / 1e6}MB"]
    if "--samples" in case.recipe:
        words += ["--calibration", str(source / "text.txt")]
    launch = [sys.executable, "-S", "-c", LAUNCH, *words]
    with contextlib.ExitStack() as stack:
        try:
            launch = in_cgroup(stack.enter_context(limited_cgroup(planned)), launch)
        except OSError as e:
            print(f"{case.name}: in no cgroup ({e})", file=sys.stderr)
        done = subprocess.run(launch, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    # the launcher itself may be what the system ends
    status, measured, seconds = json.loads(done.stdout) if done.stdout else (-9, 0, 0.0)
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    fault = f"exit status {status}: {done.stderr[-300:]}" if status else ""
    return Result(planned, measured, seconds, fault)


def main() -> None:
    """Measure all cases, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("bench-output"), help="where models and outputs go"
    )
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases to measure")
    arguments = parser.parse_args()
    print("| model | planned (MB) | measured (MB) | planned / measured | seconds |")
    print("|---|---|---|---|---|", flush=True)
    faults = []
    for case in CASES:
        if not fnmatchcase(case.name, arguments.only):
            continue
        result = measure(case, arguments.work)
        ratio = result.planned / max(result.measured, 1)
        sizes = f"{result.planned / 1e6:,.0f} | {result.measured / 1e6:,.0f} | {ratio:.2f}"
        print(f"| {case.name} | {sizes} | {result.seconds:.0f} |", flush=True)
        if result.fault or not 1 <= ratio <= MAX_RATIO:
            faults.append(f"{case.name}: {result.fault or 'planned too low or too high'}")
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
