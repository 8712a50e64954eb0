"""Data-free schemes beside llm-compressor's model-free path and `cp`, on the same files, in turn.

    python benchmarks/data_free.py --theirs /path/to/llmcompressor-env/bin/python [--work DIR] [--blocks N] [--only FORMAT ...]

Every contender is a process of its own with one thread, reading from a warm page cache. CPU seconds (user and system) are
the main figure, since they depend least on what else the machine does. Ratios are printed only between outputs that hold the
same work: the same tensors in the same dtypes and shapes, and weights no further from the source's than llm-compressor's are.
Theirs rounds with the scale of the largest magnitude, as ours does for FP8; for integers and FP4 ours searches each scale.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import torch
from attrs import asdict, frozen
from measure import Cost, run
from safetensors import safe_open

PEER = Path(__file__).parent / "peers/llmcompressor_model_free.py"
OURS = [sys.executable, "-m", "bitpress", "compress"]
MODEL = "model.safetensors"
SLACK = 1.0001  # of two errors that are the same but for how ties and scales are rounded


@frozen
class Case:
    """One format: how both are asked for it."""

    name: str
    ours: tuple[str, ...]
    theirs: str


CASES = (
    Case("fp8", ("--scheme", "fp8"), "FP8_DYNAMIC"),
    Case("fp8-block", ("--scheme", "fp8-block"), "FP8_BLOCK"),
    Case("int8-rtn", ("--scheme", "int8", "--set", "algorithm=rtn"), "W8A8"),
    Case("w4a16-rtn", ("--scheme", "w4a16", "--set", "algorithm=rtn"), "W4A16"),
    Case("nvfp4a16-rtn", ("--scheme", "nvfp4", "--set", "algorithm=rtn", "--set", "activations=float"), "NVFP4A16"),
)


def contenders(source: Path, work: Path, theirs: str, cases: Sequence[Case]) -> dict[str, list[object]]:
    """Commands by what they do."""
    found: dict[str, list[object]] = {
        "import torch, ours": [sys.executable, "-c", "import torch"],
        "import torch, theirs": [theirs, "-c", "import torch"],
        "cp": ["cp", "-r", source, work / "cp"],
    }
    for case in cases:
        arguments = [*case.ours, "--threads", "1"]
        found[f"bitpress {case.name}, --no-verify"] = [*OURS, source, work / f"ours-{case.name}", *arguments, "--no-verify"]
        found[f"bitpress {case.name}, verified"] = [*OURS, source, work / f"proved-{case.name}", *arguments]
        found[f"llm-compressor {case.theirs}"] = [theirs, PEER, source, work / f"theirs-{case.name}", case.theirs]
    return found


def different(ours: Path, theirs: Path) -> str | None:
    """What differs between the tensors of two outputs, or None; scales may have another float dtype."""
    with safe_open(ours / MODEL, "pt") as a, safe_open(theirs / MODEL, "pt") as b:
        if set(a.keys()) != set(b.keys()):
            return f"tensors of one only: {sorted(set(a.keys()) ^ set(b.keys()))[:3]}"
        for name in a.keys():  # noqa: SIM118 (not a dict)
            x, y = a.get_slice(name), b.get_slice(name)
            if x.get_shape() != y.get_shape() or (x.get_dtype() != y.get_dtype() and not name.endswith("_scale")):
                return f"{name}: {x.get_dtype()} {x.get_shape()} and {y.get_dtype()} {y.get_shape()}"
    return None


def error(source: Path, out: Path) -> float:
    """How far the first rows of all compressed weights together are from the source's, relative to their size."""
    moved = size = 0.0
    with safe_open(source / MODEL, "pt") as a, safe_open(out / MODEL, "pt") as b:
        stored = set(b.keys())
        for name in a.keys():  # noqa: SIM118 (not a dict)
            if f"{name}_scale" in stored:
                weight = a.get_slice(name)[:ROWS].float()
                tensors = {key: b.get_tensor(name + key) for key in ("", *SUFFIXES) if name + key in stored}
                height = len(tensors.get("", tensors.get("_packed")))
                found = decoded({key: t[: -(-ROWS * len(t) // height)] for key, t in tensors.items()})
                moved += float((found - weight).square().sum(dtype=torch.float64))
                size += float(weight.square().sum(dtype=torch.float64))
    return math.sqrt(moved / size)


ROWS = 256
SUFFIXES = ("_packed", "_scale", "_global_scale")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decoded(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A weight from its stored tensors, by their dtypes: compressed-tensors' layouts, written down once more."""
    scale = tensors["_scale"].float()
    if "" in tensors:  # FP8 or INT8
        numbers = tensors[""].float()
    elif tensors["_packed"].dtype == torch.uint8:  # two E2M1 numbers in a byte
        packed, scale = tensors["_packed"].int(), scale / tensors["_global_scale"]
        numbers = torch.stack([E2M1[packed & 15], E2M1[packed >> 4]], 2).flatten(1)
    else:  # eight 4-bit integers in a word, 8 added
        packed = tensors["_packed"]
        numbers = torch.stack([(packed >> 4 * i & 15) - 8 for i in range(8)], 2).flatten(1).float()
    for axis in (0, 1):
        scale = scale.repeat_interleave(-(-numbers.shape[axis] // scale.shape[axis]), axis).narrow(axis, 0, numbers.shape[axis])
    return numbers * scale


def table(costs: Mapping[str, Sequence[Cost]], source: Path, work: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row for each contender, with medians, spread, and ratios where the work is the same."""
    rows = {}
    for name, found in costs.items():
        middle = Cost(*(statistics.median(getattr(c, f) for c in found) for f in ("cpu", "wall", "memory")))
        spread = [c.cpu for c in found]
        rows[name] = {"name": name, **asdict(middle), "cpu_min": min(spread), "cpu_max": max(spread)}
    for case in cases:
        ours, peer = work / f"ours-{case.name}", rows[f"llm-compressor {case.theirs}"]
        peer["error"] = error(source, work / f"theirs-{case.name}")
        mine, fault = error(source, ours), different(ours, work / f"theirs-{case.name}")
        if not fault and mine > peer["error"] * SLACK:
            fault = f"our weights are further from the source's, {mine:.5f} and {peer['error']:.5f}"
        for row in (rows[f"bitpress {case.name}, --no-verify"], rows[f"bitpress {case.name}, verified"]):
            moved = sum(f.stat().st_size for folder in (source, ours) for f in folder.glob("*.safetensors")) / 1e9
            row |= {"wall_of_cp": row["wall"] / rows["cp"]["wall"], "gb_per_cpu_s": moved / row["cpu"], "error": mine}
            row["above_torch"] = row["memory"] - rows["import torch, ours"]["memory"]
            if fault:
                print(f"{row['name']}: no ratio, the outputs are not the same work: {fault}", file=sys.stderr)
            else:
                row["ratio"] = row["cpu"] / peer["cpu"]
    return list(rows.values())


COLUMNS = {
    "of llm-compressor": ("ratio", ".2f"),
    "wall s": ("wall", ".2f"),
    "of cp": ("wall_of_cp", ".1f"),
    "peak MB": ("memory", ".0f"),
    "above torch": ("above_torch", ".0f"),
    "GB moved per CPU s": ("gb_per_cpu_s", ".2f"),
    "weight error": ("error", ".5f"),
}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a Markdown table."""
    head = ("", "CPU s (median, min-max)", *COLUMNS)
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for key, form in COLUMNS.values()]
        print(" | ".join(["| {name} | {cpu:.2f} ({cpu_min:.2f}-{cpu_max:.2f})".format(**row), *cells]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", required=True, metavar="PYTHON", help="an interpreter with llm-compressor")
    parser.add_argument("--work", type=Path, default=Path("bench-output"), help="where the model and the outputs go")
    parser.add_argument("--blocks", type=int, default=8, help="of the model, which has 0.12 GB in each")
    parser.add_argument("--only", nargs="*", metavar="FORMAT", default=[case.name for case in CASES])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    source, work = arguments.work / f"llama-2048-{arguments.blocks}", arguments.work
    models.make(source, blocks=arguments.blocks, hidden=2048, intermediate=8192)
    cases = [case for case in CASES if case.name in arguments.only]
    commands = contenders(source, work, arguments.theirs, cases)
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for i in range(arguments.repeat):
        for name, command in commands.items():
            for folder in {w for w in command if isinstance(w, Path) and w.parent == work and w != source}:
                shutil.rmtree(folder, ignore_errors=True)
            (source / MODEL).read_bytes()  # into the page cache
            costs[name].append(run(command))
            print(f"{i + 1}/{arguments.repeat} {name}: {costs[name][-1].cpu:.2f} CPU s", file=sys.stderr)
    rows = table(costs, source, work, cases)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
