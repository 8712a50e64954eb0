"""Data-free schemes beside llm-compressor's model-free path and `cp`, on the same files, in turn.

    python benchmarks/data_free.py --theirs /path/to/llmcompressor-env/bin/python [--work DIR]
    [--blocks N] [--only FORMAT ...]

Every contender is a process of its own with one thread, reading from a warm page cache. CPU seconds
(user and system) are the main figure, since they depend least on what else the machine does. Ratios
are printed only between outputs that hold the same work: the same tensors in the same dtypes and
shapes, and weights no further from the source's than llm-compressor's are. Theirs rounds with the
scale of the largest magnitude, as ours does for FP8; for integers and FP4 ours searches each scale.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import outputs
from attrs import frozen
from measure import Cost, row, run, show

PEER = Path(__file__).parent / "peers/llmcompressor_model_free.py"
OURS = [sys.executable, "-m", "bitpress", "compress"]
# of two errors that are the same but for how ties and scales are rounded
SLACK = 1.0001


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
    Case(
        "nvfp4a16-rtn",
        ("--scheme", "nvfp4", "--set", "algorithm=rtn", "--set", "activations=float"),
        "NVFP4A16",
    ),
)


def contenders(
    source: Path, folder: Path, theirs: str, cases: Sequence[Case]
) -> dict[str, list[object]]:
    """Commands by what they do."""
    result: dict[str, list[object]] = {
        "import torch, ours": [sys.executable, "-c", "import torch"],
        "import torch, theirs": [theirs, "-c", "import torch"],
        "cp": ["cp", "-r", source, folder / "cp"],
    }
    for case in cases:
        arguments = [*case.ours, "--threads", "1"]
        result[f"bitpress {case.name}, --no-verify"] = [
            *OURS,
            source,
            folder / f"ours-{case.name}",
            *arguments,
            "--no-verify",
        ]
        result[f"bitpress {case.name}, verified"] = [
            *OURS,
            source,
            folder / f"proved-{case.name}",
            *arguments,
        ]
        result[f"llm-compressor {case.theirs}"] = [
            theirs,
            PEER,
            source,
            folder / f"theirs-{case.name}",
            case.theirs,
        ]
    return result


def table(
    costs: Mapping[str, Sequence[Cost]],
    source: Path,
    folder: Path,
    judge: str,
    cases: Sequence[Case],
) -> list[dict[str, Any]]:
    """A row for each contender, with medians, spread, and ratios where the work is the same."""
    rows = {name: row(name, result) for name, result in costs.items()}
    for case in cases:
        ours, theirs, peer = (
            folder / f"ours-{case.name}",
            folder / f"theirs-{case.name}",
            rows[f"llm-compressor {case.theirs}"],
        )
        peer |= {
            "error": outputs.error(source, theirs),
            "kl": outputs.divergence(judge, source, theirs),
        }
        mine = {"error": outputs.error(source, ours), "kl": outputs.divergence(judge, source, ours)}
        fault = outputs.different(ours, theirs)
        if not fault and mine["error"] > peer["error"] * SLACK:
            fault = (
                f"our weights are further from the source's, {mine['error']:.5f} and "
                f"{peer['error']:.5f}"
            )
        moved = (
            sum(f.stat().st_size for folder in (source, ours) for f in folder.glob("*.safetensors"))
            / 1e9
        )
        for result in (
            rows[f"bitpress {case.name}, --no-verify"],
            rows[f"bitpress {case.name}, verified"],
        ):
            result |= {
                "wall_of_cp": result["wall"] / rows["cp"]["wall"],
                "gb_per_cpu_s": moved / result["cpu"],
                **mine,
            }
            result["above_torch"] = result["memory"] - rows["import torch, ours"]["memory"]
            if fault:
                print(
                    f"{result['name']}: no ratio, the outputs are not the same work: {fault}",
                    file=sys.stderr,
                )
            else:
                result["ratio"] = result["cpu"] / peer["cpu"]
    return list(rows.values())


COLUMNS = {
    "of llm-compressor's": ("ratio", ".2f"),
    "wall s": ("wall", ".2f"),
    "of cp": ("wall_of_cp", ".1f"),
    "peak MB": ("memory", ".0f"),
    "above torch": ("above_torch", ".0f"),
    "GB moved per CPU s": ("gb_per_cpu_s", ".2f"),
    "weight error": ("error", ".5f"),
    "KL": ("kl", ".5f"),
}


def main() -> None:
    """Compress with both tools, and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--theirs", required=True, metavar="PYTHON", help="an interpreter with llm-compressor"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("bench-output"), help="where the model and the outputs go"
    )
    parser.add_argument(
        "--blocks", type=int, default=8, help="of the model, which has 0.12 GB in each"
    )
    parser.add_argument(
        "--only", nargs="*", metavar="FORMAT", default=[case.name for case in CASES]
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    source, folder = arguments.work / f"llama-2048-{arguments.blocks}", arguments.work
    models.make(source, blocks=arguments.blocks, hidden=2048, intermediate=8192)
    cases = [case for case in CASES if case.name in arguments.only]
    commands = contenders(source, folder, arguments.theirs, cases)
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for i in range(arguments.repeat):
        for name, command in commands.items():
            for folder in {
                w for w in command if isinstance(w, Path) and w.parent == folder and w != source
            }:
                shutil.rmtree(folder, ignore_errors=True)
            # into the page cache
            (source / "model.safetensors").read_bytes()
            costs[name].append(run(command))
            print(
                f"{i + 1}/{arguments.repeat} {name}: {costs[name][-1].cpu:.2f} CPU s",
                file=sys.stderr,
            )
    rows = table(costs, source, folder, arguments.theirs, cases)
    show(rows, COLUMNS)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
