"""Calibrated W4A16 beside llm-compressor's GPTQ: CPU seconds on 8 blocks, peak memory on 24.

    python benchmarks/calibrated.py --theirs /path/to/llmcompressor-env/bin/python [--work DIR] [--json FILE]

The same made-up Llamas (hidden 1024, intermediate 2816) and the same tokens of ../shared/calib/calib.jsonl for both, one thread
each, in turn. Ours runs whole, with its verification; twice where memory is looked at: free to use it, and told not to.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import models
from attrs import asdict
from measure import run

ROOT = Path(__file__).parents[1]
PEER = Path(__file__).parent / "peers/llmcompressor_gptq.py"
TEXTS = ROOT / "../shared/calib/calib.jsonl"
LENGTH = 512  # tokens of a sequence
CASES = {8: 64, 24: 16}  # blocks: sequences
SHORT = "1.4GB"  # allowed to ours where memory is short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", required=True, metavar="PYTHON", help="an interpreter with llm-compressor")
    parser.add_argument("--work", type=Path, default=Path("bench-output"), help="where models and outputs go")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    found = {}
    print("| blocks, tokens | | CPU s | wall s | peak MB |\n|---|---|---|---|---|")
    for blocks, samples in CASES.items():
        source, out = arguments.work / f"llama-{blocks}", arguments.work / "out"
        models.make(source, blocks=blocks, hidden=1024, intermediate=2816, vocabulary=4096)
        for file in (ROOT / "examples/tiny-llama").glob("tokenizer*"):
            shutil.copy(file, source)
        data = ["--calibration", TEXTS, "--samples", samples, "--sequence-length", LENGTH]
        ours = [sys.executable, "-m", "bitpress", "compress", source, out, "--scheme", "w4a16", "--threads", 1, *data]
        commands = {"bitpress": ours, "llm-compressor": [arguments.theirs, PEER, source, out, "W4A16", TEXTS, samples, LENGTH]}
        if blocks > 8:
            commands[f"bitpress --max-memory {SHORT}"] = [*ours, "--max-memory", SHORT]
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            cost = found[f"{blocks} blocks, {name}"] = run(command)
            print(f"| {blocks}, {samples * LENGTH} | {name} | {cost.cpu:.0f} | {cost.wall:.0f} | {cost.memory:.0f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({name: asdict(cost) for name, cost in found.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
