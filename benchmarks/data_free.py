"""Data-free FP8 beside llm-compressor's model-free path and `cp`, on the same files, in turn.

    python benchmarks/data_free.py --theirs /path/to/llmcompressor-env/bin/python [--work DIR] [--repeat N] [--json FILE]

Every contender is a process of its own with one thread, reading from a warm page cache. CPU seconds (user and system) are
the main figure, since they depend least on what else the machine does. Ratios are printed only between outputs that hold the
same work: the same layers in the same dtypes and shapes, whose weights agree within one step of the format.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import models
import torch
from attrs import asdict
from measure import Cost, run
from safetensors import safe_open

PEER = Path(__file__).parent / "peers/llmcompressor_model_free.py"
OURS = [sys.executable, "-m", "bitpress", "compress"]


def contenders(source: Path, work: Path, theirs: str) -> dict[str, list[object]]:
    """Commands by what they do; {OUT} of each is `work / name`."""
    found: dict[str, list[object]] = {
        "import torch, ours": [sys.executable, "-c", "import torch"],
        "import torch, theirs": [theirs, "-c", "import torch"],
        "cp": ["cp", "-r", source, work / "cp"],
    }
    for scheme, preset in (("fp8", "FP8_DYNAMIC"), ("fp8-block", "FP8_BLOCK")):
        arguments = ["--scheme", scheme, "--threads", "1"]
        found[f"bitpress {scheme}, --no-verify"] = [*OURS, source, work / f"ours-{scheme}", *arguments, "--no-verify"]
        found[f"bitpress {scheme}, verified"] = [*OURS, source, work / f"proved-{scheme}", *arguments]
        found[f"llm-compressor {preset}"] = [theirs, PEER, source, work / f"theirs-{scheme}", preset]
    return found


def different(ours: Path, theirs: Path) -> str | None:
    """What differs between two outputs beyond rounding, or None."""
    with safe_open(ours / "model.safetensors", "pt") as a, safe_open(theirs / "model.safetensors", "pt") as b:
        if set(a.keys()) != set(b.keys()):
            return f"tensors of one only: {sorted(set(a.keys()) ^ set(b.keys()))[:3]}"
        for name in a.keys():  # noqa: SIM118 (not a dict)
            x, y = a.get_tensor(name), b.get_tensor(name)
            codes = x.dtype == torch.float8_e4m3fn
            if (x.dtype != y.dtype and not name.endswith("_scale")) or x.shape != y.shape:
                return f"{name}: {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
            if codes and (x.float() - y.float()).abs().gt(x.float().abs() / 8 + 2**-9).any():
                return f"{name}: codes more than one step apart"
            if not codes and not torch.allclose(x.float(), y.float(), rtol=2**-7, atol=0):
                return f"{name}: values differ"
    return None


def table(costs: Mapping[str, Sequence[Cost]], source: Path, work: Path) -> list[dict[str, object]]:
    """A row for each contender, with medians, spread, and ratios where the work is the same."""
    middle = {
        name: Cost(*(statistics.median(getattr(c, f) for c in found) for f in ("cpu", "wall", "memory")))
        for name, found in costs.items()
    }
    base, rows = middle["import torch, ours"].memory, []
    for name, cost in middle.items():
        spread = [c.cpu for c in costs[name]]
        row: dict[str, object] = {"name": name, **asdict(cost), "cpu_min": min(spread), "cpu_max": max(spread)}
        if name.startswith("bitpress"):
            scheme = name.split()[1].rstrip(",")
            peer = next(n for n in middle if n.startswith("llm") and n.endswith("BLOCK" if "block" in scheme else "DYNAMIC"))
            out = work / f"ours-{scheme}"
            moved = sum(f.stat().st_size for folder in (source, out) for f in folder.glob("*.safetensors")) / 1e9
            row |= {
                "wall_of_cp": cost.wall / middle["cp"].wall,
                "above_torch": cost.memory - base,
                "gb_per_cpu_s": moved / cost.cpu,
            }
            if fault := different(out, work / f"theirs-{scheme}"):
                print(f"{name}: no ratio, the outputs are not the same work: {fault}", file=sys.stderr)
            else:
                row["ratio"] = cost.cpu / middle[peer].cpu
        rows.append(row)
    return rows


def show(rows: Sequence[Mapping[str, object]]) -> None:
    """Print the rows as a Markdown table."""
    head = ("", "CPU s (median, min-max)", "of llm-compressor", "wall s", "of cp", "peak MB", "above torch", "GB moved per CPU s")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))

    def number(row: Mapping[str, object], key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    for row in rows:
        cells = [
            str(row["name"]), f"{row['cpu']:.2f} ({row['cpu_min']:.2f}-{row['cpu_max']:.2f})", number(row, "ratio", ".2f"),
            f"{row['wall']:.2f}", number(row, "wall_of_cp", ".1f"), f"{row['memory']:.0f}", number(row, "above_torch", ".0f"),
            number(row, "gb_per_cpu_s", ".2f"),
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", required=True, metavar="PYTHON", help="an interpreter with llm-compressor")
    parser.add_argument("--work", type=Path, default=Path("bench-output"), help="where the model and the outputs go")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    source, work = arguments.work / "llama-1gb", arguments.work
    models.make(source, blocks=8, hidden=2048, intermediate=8192)
    commands = contenders(source, work, arguments.theirs)
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for i in range(arguments.repeat + 1):  # the first round warms the page cache
        for name, command in commands.items():
            for folder in {w for w in command if isinstance(w, Path) and w.parent == work and w != source}:
                shutil.rmtree(folder, ignore_errors=True)
            cost = run(command)
            if i:
                costs[name].append(cost)
                print(f"{i}/{arguments.repeat} {name}: {cost.cpu:.2f} CPU s", file=sys.stderr)
    rows = table(costs, source, work)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
