"""Calibrated W4A16 beside other tools' GPTQ and AutoRound: CPU seconds on 8 blocks, peak memory on
24, narrow and wide.

    python benchmarks/calibrated.py --theirs /path/to/llmcompressor-env/bin/python [--peer
    auto-round=PYTHON]
        [--peer gptqmodel=PYTHON] [--case BLOCKS HIDDEN INTERMEDIATE SEQUENCES]

The same made-up Llamas and the same tokens of ../shared/calib/calib.jsonl for all, one thread each,
in turn. Ours runs whole, with its verification; as plain GPTQ too; and again where memory is looked
at: free to use it, and told not to. A ratio is printed only where a peer's output holds the same
tensors in the same dtypes and shapes, and ours is no further from the source in KL divergence. That
is judged by transformers in the environment of each, ours in llm-compressor's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import models
import outputs
from attrs import asdict, frozen
from measure import Cost, row, run, show

ROOT = Path(__file__).parents[1]
OURS, THEIRS = "bitpress", "llm-compressor"
# Nothing of the source is run, and no gradients are taken: as others do it.
PLAIN = f"{OURS} --set reference=none"
PEERS = {
    THEIRS: "llmcompressor_gptq.py",
    "auto-round": "autoround.py",
    "gptqmodel": "gptqmodel_gptq.py",
}
TEXTS = ROOT / "../shared/calib/calib.jsonl"
# tokens of a sequence
LENGTH = 512
# On 512 tokens, chance decides between outputs that are a tenth apart.
JUDGED_TOKENS = 4096


@frozen
class Case:
    """A model's shape, sequences it is calibrated on, how much memory ours is allowed the second
    time, and how often all run.
    """

    blocks: int
    hidden: int
    intermediate: int
    samples: int
    short: str | None = None
    rounds: int = 1


CASES = (
    Case(8, 1024, 2816, 64, rounds=3),
    Case(24, 1024, 2816, 16, short="1.1GB"),
    Case(24, 2048, 5632, 8, short="2.2GB"),
)
COLUMNS = {
    "bitpress takes": ("ratio", ".2f"),
    "with reference=none": ("plain ratio", ".2f"),
    "wall s": ("wall", ".0f"),
    "peak MB": ("memory", ".0f"),
    "KL": ("kl", ".5f"),
}


def main() -> None:
    """Compress with all tools, and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--theirs", required=True, metavar="PYTHON", help="an interpreter with llm-compressor"
    )
    others = ", ".join(list(PEERS)[1:])
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"one with another tool: {others}",
    )
    parser.add_argument("--cases", type=int, default=len(CASES), help="so many of them")
    shape = ("BLOCKS", "HIDDEN", "INTERMEDIATE", "SEQUENCES")
    parser.add_argument(
        "--case", type=int, nargs=4, metavar=shape, help="one of your own, in place of them"
    )
    parser.add_argument("--repeat", type=int, help="rounds of each")
    parser.add_argument(
        "--work", type=Path, default=Path("bench-output"), help="where models and outputs go"
    )
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    peers = {THEIRS: arguments.theirs, **dict(peer.split("=", 1) for peer in arguments.peer)}
    result = []
    for case in [Case(*arguments.case)] if arguments.case else CASES[: arguments.cases]:
        result += measured(case, arguments.repeat or case.rounds, peers, arguments.work)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def measured(
    case: Case, rounds: int, peers: Mapping[str, str], folder: Path
) -> list[dict[str, Any]]:
    """Run all contenders in turn, as often as is wanted, and show what they cost and how far from
    the source they end.
    """
    source = folder / f"llama-{case.blocks}-{case.hidden}"
    models.make(source, case.blocks, case.hidden, case.intermediate)
    data = ["--calibration", TEXTS, "--samples", case.samples, "--sequence-length", LENGTH]
    limits = {
        OURS: [],
        PLAIN: ["--set", "reference=none"],
        **(
            {f"{OURS} --max-memory {case.short}": ["--max-memory", case.short]}
            if case.short
            else {}
        ),
    }
    ours = [sys.executable, "-m", "bitpress", "compress", source]
    commands = {
        n: [*ours, folder / n, "--scheme", "w4a16", "--threads", 1, *data, *limit]
        for n, limit in limits.items()
    }
    for name, python in peers.items():
        script = Path(__file__).parent / "peers" / PEERS[name]
        commands[name] = [
            python,
            script,
            source,
            folder / name,
            "W4A16",
            TEXTS,
            case.samples,
            LENGTH,
        ]
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for i in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            costs[name].append(run(command))
            print(f"{i + 1}/{rounds} {name}: {costs[name][-1].cpu:.0f} CPU s", file=sys.stderr)
    rows = {name: row(name, spent) for name, spent in costs.items()}
    for name, judge in {OURS: peers[THEIRS], PLAIN: peers[THEIRS], **peers}.items():
        rows[name]["kl"] = outputs.divergence(judge, source, folder / name, JUDGED_TOKENS)
    add_ratios(rows, peers, folder)
    print(f"\n{case.blocks} blocks, hidden {case.hidden}, {case.samples * LENGTH:,} tokens\n")
    show(list(rows.values()), COLUMNS)
    return [{"case": asdict(case), **result} for result in rows.values()]


def add_ratios(rows: Mapping[str, dict[str, Any]], peers: Iterable[str], folder: Path) -> None:
    """Put into each peer's row what ours take of its CPU seconds, where they did the same work."""
    for name in peers:
        for own, column in ((OURS, "ratio"), (PLAIN, "plain ratio")):
            fault = outputs.different(folder / own, folder / name)
            mine, other = rows[own]["kl"], rows[name]["kl"]
            if not fault and (mine is None or other is None or mine > other):
                fault = f"it may be further from the source, in KL divergence {mine} and {other}"
            if fault:
                print(f"{own}: no ratio to {name}, which did other work: {fault}", file=sys.stderr)
            else:
                rows[name][column] = rows[own]["cpu"] / rows[name]["cpu"]


if __name__ == "__main__":
    main()
