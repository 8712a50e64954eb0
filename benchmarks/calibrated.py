"""Calibrated W4A16 beside other tools' GPTQ and AutoRound: CPU seconds on 8 blocks, peak memory on 24, narrow and wide.

    python benchmarks/calibrated.py --peer llm-compressor=/path/to/its/bin/python [--peer auto-round=...] [--peer gptqmodel=...]

The same made-up Llamas and the same tokens of ../shared/calib/calib.jsonl for all, one thread each, in turn. Ours runs whole,
with its verification; twice where memory is looked at: free to use it, and told not to.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import models
from attrs import asdict, frozen
from measure import run

ROOT = Path(__file__).parents[1]
PEERS = {"llm-compressor": "llmcompressor_gptq.py", "auto-round": "autoround.py", "gptqmodel": "gptqmodel_gptq.py"}
TEXTS = ROOT / "../shared/calib/calib.jsonl"
LENGTH = 512  # tokens of a sequence


@frozen
class Case:
    """A model's shape, how many sequences it is calibrated on, and how much memory ours is allowed the second time."""

    blocks: int
    hidden: int
    intermediate: int
    samples: int
    short: str | None = None


CASES = (Case(8, 1024, 2816, 64), Case(24, 1024, 2816, 16, "1.1GB"), Case(24, 2048, 5632, 8, "2.2GB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PYTHON", help=f"one of {', '.join(PEERS)}, where it is"
    )
    parser.add_argument("--cases", type=int, default=len(CASES), help="so many of them")
    parser.add_argument("--work", type=Path, default=Path("bench-output"), help="where models and outputs go")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = {}
    print("| blocks, hidden, tokens | | CPU s | wall s | peak MB |\n|---|---|---|---|---|")
    for case in CASES[: arguments.cases]:
        source, out = arguments.work / f"llama-{case.blocks}-{case.hidden}", arguments.work / "out"
        models.make(source, case.blocks, case.hidden, case.intermediate, vocabulary=4096)
        for file in (ROOT / "examples/tiny-llama").glob("tokenizer*"):
            shutil.copy(file, source)
        data = ["--calibration", TEXTS, "--samples", case.samples, "--sequence-length", LENGTH]
        ours = [sys.executable, "-m", "bitpress", "compress", source, out, "--scheme", "w4a16", "--threads", 1, *data]
        commands = {"bitpress": ours}
        for name, python in (peer.split("=", 1) for peer in arguments.peer):
            script = Path(__file__).parent / "peers" / PEERS[name]
            commands[name] = [python, script, source, out, "W4A16", TEXTS, case.samples, LENGTH]
        if case.short:
            commands[f"bitpress --max-memory {case.short}"] = [*ours, "--max-memory", case.short]
        tokens = case.samples * LENGTH
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            cost = found[f"{case.blocks} blocks of {case.hidden}, {name}"] = run(command)
            told = f"{case.blocks}, {case.hidden}, {tokens} | {name} | {cost.cpu:.0f} | {cost.wall:.0f} | {cost.memory:.0f}"
            print(f"| {told} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({name: asdict(cost) for name, cost in found.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
