"""The GPTQ solve of one layer beside llm-compressor's: same weight, same Hessian, one thread, a
process each.

    python benchmarks/solve.py --theirs /path/to/llmcompressor-env/bin/python [--work DIR] [--size
    N] [--repeat N] [--json FILE]

Counted is the solve alone: from the Hessian to 4-bit codes in groups of 128 (factorisation, scales,
sweep), by each process itself. Layer error is tr((W - Q) H (W - Q)^T) / tr(W H W^T), taken here of
the numbers that both wrote, of which is shown first that they are what 4 bits in groups of 128 can
hold. The ratio is printed only where our error is no higher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from measure import ENVIRONMENT
from safetensors.torch import load_file, save_file

PEERS = Path(__file__).parent / "peers"
BITS, GROUP = 4, 128


def make(file: Path, size: int) -> None:
    """A weight, and the Hessian of inputs (4 tokens a channel) whose channels differ in size and go
    together, as a model's do.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) * 0.02
    spread = torch.randn(size, generator=generator).exp_()
    mixing = torch.randn(size // 8, size, generator=generator) / (size // 8) ** 0.5
    tokens, hessian = 4 * size, torch.zeros(size, size)
    for _ in range(0, tokens, size):
        inputs = (
            torch.randn(size, size // 8, generator=generator) @ mixing
            + torch.randn(size, size, generator=generator) / 2
        )
        inputs *= spread
        hessian.addmm_(inputs.T, inputs)
    save_file({"weight": weight, "hessian": hessian, "tokens": torch.tensor(float(tokens))}, file)


def fault(weight: torch.Tensor, scale: torch.Tensor) -> str | None:
    """Why these numbers are not `BITS` bits in groups of `GROUP`, or None."""
    if list(scale.shape) != [len(weight), weight.shape[1] // GROUP]:
        return (
            f"scales of shape {list(scale.shape)} for a weight of {list(weight.shape)} in groups "
            f"of {GROUP}"
        )
    codes = weight.view(len(weight), -1, GROUP) / scale.unsqueeze(2)
    if not torch.allclose(codes, codes.round(), atol=2**-6, rtol=0):
        return "its numbers are no multiples of their scales"
    if codes.min() < -(2 ** (BITS - 1)) - 0.5 or codes.max() > 2 ** (BITS - 1) - 0.5:
        return f"codes from {codes.min():.0f} to {codes.max():.0f}"
    return None


def main() -> None:
    """Solve one layer with both tools, and print how they compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--theirs", required=True, metavar="PYTHON", help="an interpreter with llm-compressor"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("bench-output"), help="where the layer and the results go"
    )
    parser.add_argument("--size", type=int, default=4096, help="rows and columns")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    layer_file, out = (
        arguments.work / f"layer-{arguments.size}.safetensors",
        arguments.work / "solved.safetensors",
    )
    make(layer_file, arguments.size)
    layer = load_file(layer_file)
    commands = {
        "bitpress": [sys.executable, PEERS / "bitpress_solve.py"],
        "llm-compressor": [arguments.theirs, PEERS / "llmcompressor_solve.py"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    errors = {}
    for _ in range(arguments.repeat):
        for name, command in commands.items():
            words = [*map(str, command), str(layer_file), str(out), str(BITS), str(GROUP)]
            done = subprocess.run(
                words, env=ENVIRONMENT, check=True, stdout=subprocess.PIPE, text=True
            )
            seconds[name].append(float(done.stdout.splitlines()[-1]))
            stored = load_file(out)
            if why := fault(stored["weight"], stored["scale"]):
                raise SystemExit(f"{name}: not the work that was asked for: {why}")
            errors[name] = loss(layer["weight"] - stored["weight"], layer["hessian"]) / loss(
                layer["weight"], layer["hessian"]
            )
    rows = [
        {
            "name": n,
            "cpu": statistics.median(s),
            "least": min(s),
            "most": max(s),
            "error": errors[n],
        }
        for n, s in seconds.items()
    ]
    print(
        f"| {arguments.size} x {arguments.size} | CPU s (median, min-max) | layer error |"
        "\n|---|---|---|"
    )
    for row in rows:
        print("| {name} | {cpu:.2f} ({least:.2f}-{most:.2f}) | {error:.6f} |".format(**row))
    if errors["bitpress"] > errors["llm-compressor"]:
        raise SystemExit("no ratio: our layer error is higher")
    print(f"\nratio: {rows[0]['cpu'] / rows[1]['cpu']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def loss(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T)."""
    return float(((error @ hessian) * error).sum(dtype=torch.float64))


if __name__ == "__main__":
    main()
