"""Products on sparse tensor cores beside dense ones, for layers of an 8B model.

    python benchmarks/sparse_products.py [--device cuda] [--small] [--out FILE]

Of each shape and number of tokens it writes the median milliseconds of torch's dense FP8 product,
with a scale for each token and channel, of the sparse one with the same scales, and of 6:8 in
windows, whose inputs are repeated first; and how far sparse results are from dense ones. It needs
bitpress-vllm-sparse, and not vLLM. `--device cpu --small` shows that the parts work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress_vllm_sparse import sparse_product, windows

SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))
TOKENS = (1, 16, 64, 256, 1024, 4096)
NUM_RUNS = 20
FP8 = torch.float8_e4m3fn
TESTS = Path(__file__).parents[1] / "packages/vllm-sparse/tests"


def prune(weight: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Zeros for all but the largest `num_kept` of every `group_size` neighbors."""
    groups = weight.float().view(len(weight), -1, group_size)
    kept = groups.abs().topk(num_kept, 2).indices
    return torch.zeros_like(groups).scatter_(2, kept, groups.gather(2, kept)).flatten(1).to(FP8)


def median_ms(run: Callable[[], Tensor], device: torch.device) -> float:
    """Of NUM_RUNS calls, after two that are not counted."""
    times = []
    for _ in range(NUM_RUNS + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def sparse_linear(weight: Tensor, scale: Tensor, columns: Tensor | None) -> Callable[..., Tensor]:
    """(inputs, scales of tokens) -> bfloat16 outputs."""
    algorithms = sparse_product.choose_algorithms(weight, torch.bfloat16)
    packed, num_rows = sparse_product.pack(weight), len(weight)

    def run(inputs: Tensor, token_scale: Tensor) -> Tensor:
        taken = inputs if columns is None else windows.repeat_inputs(inputs, columns)
        result = sparse_product.linear(taken, packed, num_rows, torch.bfloat16, algorithms)
        return (result * token_scale * scale).to(torch.bfloat16)

    return run


def measure(shape: tuple[int, int], num_tokens: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each product, and the largest relative distances from dense ones."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device).to(FP8)
    inputs = torch.randn(num_tokens, shape[1], generator=generator, device=device).to(FP8)
    scale = torch.rand(1, shape[0], generator=generator, device=device) + 0.5
    token_scale = torch.rand(num_tokens, 1, generator=generator, device=device) + 0.5
    found: dict[str, Any] = {"shape": shape, "tokens": num_tokens}
    for name, num_kept, group_size in (("2:4", 2, 4), ("6:8", 6, 8)):
        pruned = prune(weight, num_kept, group_size)
        columns, packed = None, pruned
        if name == "6:8":
            columns = windows.window_columns(shape[1], device)
            packed = windows.spread(pruned, pruned.float() != 0)
        run = sparse_linear(packed, scale, columns)

        def dense(pruned: Tensor = pruned) -> Tensor:
            return torch._scaled_mm(inputs, pruned.T, token_scale, scale, out_dtype=torch.bfloat16)

        expected, result = dense().float(), run(inputs, token_scale).float()
        found[f"{name} distance"] = float((result - expected).norm() / expected.norm())
        found[f"{name} dense ms"] = median_ms(dense, device)
        found[f"{name} sparse ms"] = median_ms(lambda run=run: run(inputs, token_scale), device)
    return found


def main() -> None:
    """Measure every shape, and write a line of JSON for each."""
    parser = argparse.ArgumentParser(description="products on sparse tensor cores")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it works")
    parser.add_argument("--out", type=Path, help="a file for the lines, beside standard output")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        sys.path.insert(0, str(TESTS))
        import cslt_reference

        library = cslt_reference.install()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    lines = [json.dumps({"device": name, "torch": torch.__version__})]
    print(lines[0], flush=True)
    for shape in [(64, 128)] if arguments.small else SHAPES:
        for num_tokens in (16, 32) if arguments.small else TOKENS:
            lines.append(json.dumps(measure(shape, num_tokens, device)))
            print(lines[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if device.type == "cpu":
        library._destroy()


if __name__ == "__main__":
    main()
