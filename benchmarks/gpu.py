"""bitpress on a GPU, checked in ten minutes.

    python benchmarks/gpu.py [--device cuda] [--small] [--only exact,sweep] [--seconds N] [--out D]

Each part writes what it finds into gpu.json at once, and goes on where another fails:

- `exact`: logarithms, powers, divisions, float8 and packing beside the CPU;
- `hooks`: every scheme and option on awkward weights beside the CPU;
- `collectives`: those of a rank, on one that is made to believe that it is not alone;
- `pieces`: milliseconds of the largest pieces of a solve, with one thing changed;
- `experts`: milliseconds of factors and scales of experts, one by one and together;
- `sweep`: error feedback in the loop and in the kernel, and how many numbers differ;
- `runs`: schemes on a small model, their losses beside the CPU's;
- `calibrated`: seconds for each block of Llama 3.1 8B's shape, and peak memory;
- `free`: GB/s without data, beside copies;
- `launches`: kernels that error feedback starts, counted without a GPU, if asked for by name.

On a CPU, `--device cpu --small` shows that the parts work.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import launches
import models
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

import bitpress
from bitpress import Layer, numerics
from bitpress.conformance import trial
from bitpress.numerics import gram, kernel_trial, rows, scale_search
from bitpress.runtime.batching import map_batched
from bitpress.runtime.process_group import ProcessGroup
from bitpress.schemes import pipeline
from bitpress.schemes.registry import Step, discover

TEXT = Path(__file__).parents[1] / "examples/chapters.txt"
RUNS = (
    ("fp8", ()),
    ("fp8-block", ()),
    ("w4a16", ()),
    ("int8", ()),
    ("nvfp4", ()),
    ("sparse-2of4", ()),
    ("sparse-2of4+fp8", ()),
    ("fp8", ("activations=static", "outliers=mse")),
    ("w4a16", ("symmetric=false",)),
    ("nvfp4", ("activations=float", "algorithm=rtn")),
)
FREE = (
    ("fp8", ()),
    ("fp8-block", ()),
    ("nvfp4", ("algorithm=rtn", "activations=float")),
    ("w4a16", ("algorithm=rtn",)),
    ("int8", ("algorithm=rtn",)),
)
Found = dict[str, Any]


class Kit:
    """What is asked for, and what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.is_small, self.out = arguments.small, arguments.out
        self.work = Path(tempfile.mkdtemp(prefix="bitpress-gpu-"))
        self._begun, self._seconds = time.time(), arguments.seconds
        self._results: Found = {}

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def report(self, name: str, value: Any) -> None:
        """Keep a result, and print it."""
        self._results[name] = value
        print(f"[{time.time() - self._begun:6.1f} s] {name}: {json.dumps(value)}", flush=True)
        (self.out / "gpu.json").write_text(json.dumps(self._results, indent=1))

    def attempt(self, name: str, part: Callable[[], Any]) -> None:
        """Report what a part finds; what does not work is a result too."""
        if time.time() - self._begun > self._seconds:
            return self.report(name, "skipped: no time left")
        try:
            self.report(name, part())
        except Exception as e:
            frames = traceback.extract_tb(e.__traceback__)[-4:]
            places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
            self.report(name, {"failed": f"{type(e).__name__}: {str(e)[:400]}", "at": places})
        if self.is_gpu:
            torch.cuda.empty_cache()
        return None

    def milliseconds(self, function: Callable[[], Any], times: int = 3) -> float:
        """What a call takes, the first one left out."""
        function()
        self.synchronize()
        begun = time.perf_counter()
        for _ in range(times):
            function()
        self.synchronize()
        return round(1e3 * (time.perf_counter() - begun) / times, 2)

    def model(self, name: str, blocks: int, hidden: int, intermediate: int) -> Path:
        """A made-up Llama."""
        models.make(self.work / name, blocks, hidden, intermediate, shards=blocks)
        return self.work / name


def exact(kit: Kit) -> Found:
    """What is taken for exact."""
    exponents = torch.arange(-60.0, 60.0)
    draw = torch.Generator().manual_seed(0)
    sizes = (1e-3, 1.0, 30.0, 448.0)
    x = torch.cat([torch.randn(100_000, generator=draw) * size for size in sizes])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 448.0, 464.0, 2.0**-10, 2.0**-9])])

    def is_same(function: Callable[..., Tensor], *tensors: Tensor) -> bool:
        there = function(*(tensor.to(kit.device) for tensor in tensors)).cpu()
        return torch.equal(there, function(*tensors))

    nibbles = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=draw)
    found = {
        "exp2 of whole numbers": is_same(torch.exp2, exponents),
        "log2 of powers of two, rounded": is_same(lambda e: e.exp2().log2().round(), exponents),
        "ldexp": is_same(lambda e: torch.ones_like(e).ldexp(e.int()), exponents),
        "frexp": is_same(lambda a: a.frexp().mantissa, x),
        "x / 448, a number": is_same(lambda a: a / 448.0, x),
        "x / 448, a tensor": is_same(lambda a: a / a.new_tensor(448.0), x),
        "x / y": is_same(lambda a, b: a / b, x, x.abs() + 0.1),
        "E4M3": is_same(
            lambda a: numerics.decode_e4m3(numerics.encode_e4m3(a, torch.ones_like(a))), x
        ),
        "E2M1": is_same(
            lambda a: numerics.decode_e2m1(numerics.encode_e2m1(numerics.round_e2m1(a))), x
        ),
        "packing": is_same(lambda a: numerics.pack_words(a, 4), nibbles),
        "float8 joined": is_same(lambda a: torch.cat([a.to(torch.float8_e4m3fn)] * 2).float(), x),
    }
    return found | {"kernels in Triton are used": kernel_trial.can_fuse(kit.device)}


def hooks(kit: Kit) -> Found:
    """Every scheme and option on awkward weights, beside the CPU."""
    moved: dict[str, float] = {}
    different, failed = [], {}
    of_layers = [s.name for s in discover().schemes.values() if not s.quantizes_cache]
    for name in sorted(of_layers):
        for label, step in trial.variants(name, (), discover()).items():
            for kind, weight in trial.weights(step).items():
                case = f"{name}, {label}, {kind}"
                try:
                    here, there = (
                        stored(step, weight, move)
                        for move in (torch.clone, lambda tensor: tensor.to(kit.device))
                    )
                except Exception as e:
                    failed[case] = f"{type(e).__name__}: {str(e)[:160]}"
                    continue
                shape = tuple(weight.shape)
                a, b = (
                    pipeline.dequantize(x.tensors, x.config, [step], shape).cpu().double()
                    for x in (here, there)
                )
                moved[case] = float((a - b).norm() / a.norm().clamp(min=1e-300))
                if not all(
                    trial.are_equal(there.tensors[key].cpu(), tensor)
                    for key, tensor in here.tensors.items()
                ):
                    different.append(case)
    largest = sorted(moved.items(), key=lambda item: -item[1])[:12]
    return {
        "failed": failed,
        "cases": len(moved),
        "other bytes": len(different),
        "weights moved most": dict(largest),
    }


def stored(step: Step, weight: Tensor, move: Callable[[Tensor], Tensor]) -> Any:
    """What a scheme stores of a weight and inputs that lie somewhere."""
    draw = torch.Generator().manual_seed(0)
    layer, stats = Layer("layer", move(weight), torch.bfloat16), {}
    for _ in range(2 if step.calibrated else 0):
        x = torch.randn(160, weight.shape[1], generator=draw)
        reference = x + 0.01 * torch.randn(x.shape, generator=draw)
        residual = torch.randn(160, len(weight), generator=draw)
        pipeline.merge(
            stats, pipeline.observe(step, layer.weight, move(x), move(reference), move(residual))
        )
    if step.scheme.takes_argument("observe", "weight"):
        pipeline.merge(stats, pipeline.observe(step, layer.weight))
    quantized = pipeline.quantize(layer, [step], [stats])
    return pipeline.serialize(pipeline.pack(quantized, [step]), [step])


def collectives(kit: Kit) -> Found:
    """What ranks do with each other, of one rank that takes itself for two."""
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    backend = "cpu:gloo,cuda:nccl" if kit.is_gpu else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    group, x = ProcessGroup(0, 2), torch.randn(64, 32, device=kit.device)
    f8, added = x.to(torch.float8_e4m3fn), x.clone()
    group.reduce(added, 0, "sum")
    last = group.broadcast_from_last(x, kit.device)
    found = {
        "objects": group.all_gather_object({"a": 1}) == [{"a": 1}, None],
        "float8": torch.equal(group.broadcast(f8.clone(), 0).float(), f8.float()),
        "bfloat16": torch.equal(group.broadcast(x.bfloat16(), 0), x.bfloat16()),
        "sum": torch.equal(added, x),
        "factors arrive on": str(None if last is None else last.device),
        "sent from": str(x.device),
    }
    dist.destroy_process_group()
    return found


def problem(kit: Kit) -> tuple[Tensor, Tensor, numerics.Factor]:
    """A weight as stacked gate and up projections, inputs, and the factor of their Hessian."""
    tokens, width, num_rows = (512, 512, 1024) if kit.is_small else (4096, 4096, 28672)
    draw = torch.Generator(kit.device).manual_seed(0)
    x = torch.randn(tokens, width, device=kit.device, generator=draw).bfloat16().float()
    weight = torch.randn(num_rows, width, device=kit.device, generator=draw) * 0.02
    diagonal = torch.eye(width, device=kit.device).mul_(0.1 * tokens)
    factor = numerics.factorize_hessian(gram.gram(x) + diagonal, float(tokens))
    assert factor is not None
    return weight, x, factor


def fit(weight: Tensor, factor: numerics.Factor) -> numerics.IntegerGrid:
    """The grid of w4a16."""
    ratios = tuple(1.08 - 0.02 * i for i in range(32))
    return numerics.fit_symmetric(weight, factor.diagonal, 4, 128, ratios, dtype=torch.bfloat16)


def pieces(kit: Kit) -> Found:
    """Milliseconds of the largest pieces of a solve, and with one constant or switch changed."""
    weight, x, factor = problem(kit)
    found: Found = {}
    half = x.bfloat16()
    # on a CPU they are float32
    half = half.to(gram.product_dtype(half))
    for name, inputs, is_allowed in (
        ("float32", x, False),
        ("TF32", x, True),
        ("bfloat16", half, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = is_allowed
        run = functools.partial(gram.gram, inputs)
        found[f"sums over {len(x)} tokens, {name}"] = kit.milliseconds(run)
    torch.backends.cuda.matmul.allow_tf32 = False
    hessian = gram.gram(x) + torch.eye(x.shape[1], device=kit.device)
    found["factor"] = kit.milliseconds(lambda: numerics.factorize_hessian(hessian, float(len(x))))
    for chunk in (scale_search.WEIGHTS_PER_CHUNK, scale_search.WEIGHTS_PER_CHUNK_ON_GPU):
        with patch.object(scale_search, "WEIGHTS_PER_CHUNK_ON_GPU", chunk):
            found[f"scales, {chunk} weights at a time"] = kit.milliseconds(
                lambda: fit(weight, factor)
            )
    found["drift"] = kit.milliseconds(lambda: factor.solve(weight))
    states = torch.empty(2048 * weight.shape[1], dtype=torch.bfloat16)
    found["hidden states there"] = kit.milliseconds(lambda: states.to(kit.device))
    found["and back"] = kit.milliseconds(lambda: states.to(kit.device).cpu())
    return found


def experts(kit: Kit) -> Found:
    """Milliseconds of factors and scales of experts, one by one and with a batch axis."""
    num_experts, width, num_rows = (4, 256, 128) if kit.is_small else (16, 2048, 1536)
    draw = torch.Generator(kit.device).manual_seed(0)
    x = torch.randn(num_experts, 2 * width, width, device=kit.device, generator=draw)
    hessians = [gram.gram(own) for own in x]
    weights = list(torch.randn(num_experts, num_rows, width, device=kit.device, generator=draw))

    def factorize(hessian: Tensor) -> numerics.Factor | None:
        return numerics.factorize_hessian(hessian, 2.0 * width)

    factor = factorize(hessians[0])
    assert factor is not None
    found: Found = {}
    for name, work, items in (
        ("factors", factorize, hessians),
        ("scales", lambda weight: fit(weight, factor), weights),
    ):
        one_by_one, together = (
            kit.milliseconds(functools.partial(compute, work, items))
            for compute in (lambda work, items: list(map(work, items)), map_batched)
        )
        found[f"{name} of {num_experts}, one by one"] = one_by_one
        found[f"{name} of {num_experts}, together"] = together
    return found


def sweep(kit: Kit) -> Found:
    """Milliseconds of error feedback in the loop, whose rows are decided in slices or together, and
    in the kernel where there is one.
    """
    weight, _, factor = problem(kit)
    grid = fit(weight, factor)

    def time_sweep() -> tuple[float, Tensor]:
        return (
            kit.milliseconds(lambda: numerics.column_sweep(weight, factor, grid.nearest), 1),
            numerics.column_sweep(weight, factor, grid.nearest)[0],
        )

    found: Found = {}
    with patch.object(rows, "WEIGHTS_TOGETHER_ON_GPU", 1):
        found[f"loop, {rows.ROW_TILE} rows together"], _ = time_sweep()
    found[f"loop, {len(weight)} rows together"], expected = time_sweep()
    if kernel_trial.can_fuse(kit.device):

        def run() -> Tensor:
            rule = grid.rounding_rule
            return numerics.column_sweep(weight, factor, grid.nearest, rule=rule)[0]

        found["kernel"] = kit.milliseconds(run)
        found["share of numbers that differ"] = float((run() != expected).float().mean())
    return found


def run(kit: Kit, scheme: str, settings: tuple[str, ...]) -> Found:
    """A whole run on the device and on a CPU: errors, losses, seconds."""
    model = kit.model("small", 2, 512, 1024)
    options = {"calibration": TEXT, "samples": 16, "sequence_length": 128, "settings": settings}
    manifests, found = {}, {}
    for place, device in (("on a CPU", "cpu"), ("here", str(kit.device))):
        out = kit.work / place
        shutil.rmtree(out, ignore_errors=True)
        begun = time.perf_counter()
        manifests[place] = bitpress.compress(model, out, scheme=scheme, device=device, **options)
        found[f"seconds {place}"] = round(time.perf_counter() - begun, 2)
        found[f"KL made {place}"] = bitpress.eval(out, TEXT, model, max_tokens=2048).kl
    here, cpu = manifests["here"].layers, manifests["on a CPU"].layers
    ratios = [here[name].error / max(layer.error, 1e-9) for name, layer in cpu.items()]
    found["errors beside the CPU's"] = [round(min(ratios), 4), round(max(ratios), 4)]
    faults = bitpress.verify(kit.work / "here", model).faults
    return found | {"faults": [str(fault) for fault in faults][:3]}


def calibrated(kit: Kit, scheme: str) -> Found:
    """Seconds of the second of two blocks of Llama 3.1 8B's shape, and peak memory."""
    shape, samples, length = ((512, 1024), 4, 128) if kit.is_small else ((4096, 14336), 128, 2048)
    model, out = kit.model("llama", 2, *shape), kit.work / "calibrated"
    shutil.rmtree(out, ignore_errors=True)
    done: list[float] = []

    def progress(stage: str, num_bytes: int) -> Callable[..., None]:
        def report(done_bytes: int, text: str = "") -> None:
            if text.endswith("done"):
                done.append(time.perf_counter())

        return report

    if kit.is_gpu:
        torch.cuda.reset_peak_memory_stats(kit.device)
    begun = time.perf_counter()
    bitpress.compress(
        model,
        out,
        scheme=scheme,
        calibration=TEXT,
        samples=samples,
        sequence_length=length,
        device=str(kit.device),
        verify=False,
        progress=progress,
    )
    found: Found = {"seconds": round(time.perf_counter() - begun, 2)}
    per_block = len(done) // 2
    if per_block:
        found["seconds of the second block"] = round(done[-1] - done[per_block - 1], 2)
    if kit.is_gpu:
        found["peak GB"] = round(torch.cuda.max_memory_allocated(kit.device) / 1e9, 2)
    return found


def free(kit: Kit) -> Found:
    """GB/s of source without data, beside copies."""
    blocks, hidden, intermediate = (2, 512, 1024) if kit.is_small else (16, 4096, 14336)
    model = kit.model("source", blocks, hidden, intermediate)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    found: Found = {}
    if kit.is_gpu:
        here = torch.empty(1 << 28, dtype=torch.uint8)
        pinned, there = here.pin_memory(), here.to(kit.device)
        copies: Mapping[str, Callable[[], Any]] = {
            "to the device": lambda: there.copy_(here),
            "to the device, pinned": lambda: there.copy_(pinned, non_blocking=True),
            "from the device": lambda: there.cpu(),
        }
        for name, copy in copies.items():
            found[f"GB/s {name}"] = round(here.numel() / kit.milliseconds(copy) / 1e6, 2)
    for scheme, settings in FREE:
        for verify in (False, True) if scheme == "fp8" else (False,):
            out = kit.work / "free"
            shutil.rmtree(out, ignore_errors=True)
            begun = time.perf_counter()
            bitpress.compress(
                model,
                out,
                scheme=scheme,
                settings=settings,
                device=str(kit.device),
                threads=min(os.cpu_count() or 1, 8),
                verify=verify,
            )
            name = f"GB/s {scheme}{', verified' if verify else ''}"
            found[name] = round(size / (time.perf_counter() - begun) / 1e9, 2)
    return found


PARTS: Mapping[str, Callable[[Kit], Any]] = {
    "exact": exact,
    "hooks": hooks,
    "collectives": collectives,
    "pieces": pieces,
    "experts": experts,
    "sweep": sweep,
    "free": free,
    "launches": lambda kit: launches.table(4096, 14336, 1024, experts=1, together=1),
}
DEFAULT = "exact,hooks,collectives,pieces,experts,sweep,runs,calibrated,free"


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", default=DEFAULT, help="parts, joined by commas")
    parser.add_argument("--seconds", type=float, default=540, help="no part begins after these")
    parser.add_argument("--out", type=Path, default=Path())
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kit, asked = Kit(arguments), arguments.only.split(",")
    kit.report(
        "about",
        {
            "device": torch.cuda.get_device_name(kit.device) if kit.is_gpu else "CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bitpress": importlib.metadata.version("bitpress-core"),
        },
    )
    for name, part in PARTS.items():
        if name in asked:
            kit.attempt(name, functools.partial(part, kit))
    if "runs" in asked:
        for scheme, settings in RUNS[:3] if kit.is_small else RUNS:
            kit.attempt(
                " ".join(["run", scheme, *settings]), functools.partial(run, kit, scheme, settings)
            )
    if "calibrated" in asked:
        for scheme in ("w4a16", "nvfp4", "int8", "sparse-2of4")[: 1 if kit.is_small else 4]:
            kit.attempt(f"calibrated {scheme}", functools.partial(calibrated, kit, scheme))
    shutil.rmtree(kit.work, ignore_errors=True)


if __name__ == "__main__":
    main()
