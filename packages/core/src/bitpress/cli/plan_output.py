"""How a plan is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from bitpress.cli.output import USABLE, gb, serves, table as columns, unfavourable, warn
from bitpress.schemes.hardware import KNOWN
from bitpress.schemes.registry import Step

if TYPE_CHECKING:
    from bitpress.planning.plan import Plan
    from bitpress.planning.tensor_parallel import Remark
    from bitpress.planning.time_estimate import RankWork

# stacks; more are shown with stars for their numbers
MANY = 200


@frozen
class Needs:
    """What a plan asks for.

    Attributes:
        memory: bytes of a process at least, Python and its libraries included.
        scratch: bytes on disk beside the output, where a process has no more memory than that.
        ranks: of the engine that will serve the result.
        remarks: what it will make of the layers.
        shares: what each process of the run does.
        threads: of each.
        seconds: until the last of them is done, on CPUs like the one that rates were measured on.
    """

    memory: int
    scratch: int
    ranks: int
    remarks: tuple[Remark, ...]
    shares: tuple[RankWork, ...]
    threads: int
    seconds: float


def table(work: Plan, needs: Needs) -> None:
    """What is compressed and what is left alone, and why; sizes before and after, what the run
    needs, and remarks.
    """
    # it knows torch, which takes a second
    from bitpress.checkpoint.layer_names import alike

    said = [
        (s, (_steps(s.steps), f"{_mean_bits(s):.2f}", work.recipe.reason(next(iter(s.members)))))
        for s in work.stacks
    ]
    together = [
        (name, count, *what)
        for name, what, count in alike((stack.name, what) for stack, what in said)
    ]
    rows = together if len(said) > MANY else [(stack.name, 1, *what) for stack, what in said]
    columns(("layers", "count", "steps", "bits per weight", "why"), rows)
    print()
    plain = alike((entry.name, reason) for entry, reason in work.uncompressed)
    columns(
        ("copied unchanged", "count", "why"),
        [(name, count, reason) for name, reason, count in plain],
    )
    count = sum(len(stack.members) for stack in work.stacks)
    total = sum(work.file_sizes.values())
    print(f"\n{count} layers compressed, {len(work.uncompressed)} tensors copied unchanged")
    print(
        f"size    {gb(work.source_bytes)} -> {gb(work.output_bytes)} "
        f"({work.source_bytes / work.output_bytes:.2f}x smaller)"
    )
    print(
        f"output  {total:,} bytes in {len(work.file_sizes)} files; beside them bitpress.json and "
        "README.md"
    )
    spilled = (
        f"; with no more than that, {gb(needs.scratch)} of hidden states go to disk"
        if needs.scratch
        else ""
    )
    each = " each process" if len(needs.shares) > 1 else ""
    print(f"memory  about {gb(needs.memory)}{each}, torch included{spilled}")
    _work(needs)
    data = "needed: texts like those that it will serve (--calibration)"
    print(f"data    {data if work.recipe.calibrated else 'none needed'}")
    for step in {step.scheme.name: step for step in work.recipe.all_steps}.values():
        print(f"serves  {step.scheme.name}: {serves(step, KNOWN)}")
    for name, finding in work.findings if work.device in KNOWN else ():
        print(f"device  {work.device.name}: {name} is {finding.level}, {finding.text}")
    remarks(work, work.warnings, needs.remarks)


def _work(needs: Needs) -> None:
    """The largest share of the work, and the time that it may take."""
    from bitpress.planning import time_estimate

    names = ("reads", "writes", "tokens", "products")
    reads, writes, tokens, products = (
        max(getattr(share, name) for share in needs.shares) for name in names
    )
    solutions = sum(share.solutions for share in needs.shares)
    who = f"each of {len(needs.shares)} processes at most: " if len(needs.shares) > 1 else ""
    print(
        f"work    {who}{gb(reads)} read, {gb(writes)} written"
        + (
            f"; {products / 1e12:,.3g} TFLOP on {tokens:,} tokens, {solutions / 1e12:,.3g} to fit "
            "layers"
            if tokens
            else ""
        )
    )
    rates = [
        f"reads {gb(int(time_estimate.READ_RATE))}",
        f"proves {gb(int(time_estimate.VERIFY_RATE))}",
    ]
    rates += (
        [
            f"computes {time_estimate.PRODUCT_RATE / 1e9:g} GFLOP",
            f"fits {time_estimate.SOLVE_RATE / 1e9:g}",
        ]
        if tokens
        else []
    )
    threads = f"{needs.threads} thread{'s' * (needs.threads > 1)} each"
    print(
        f"time    about {_duration(needs.seconds)} with {threads}, where in a second a core "
        f"{', '.join(rates)}"
    )


def _duration(seconds: float) -> str:
    units = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
    name, size = next((unit for unit in units if seconds >= 2 * unit[1]), units[-1])
    return f"{seconds / size:.2g} {name}"


def as_json(work: Plan, needs: Needs) -> dict[str, Any]:
    """The plan as JSON."""
    layers = [
        {
            "name": module,
            "steps": [_step_json(s) for s in stack.steps],
            "stack": stack.name,
            "shape": list(entry.shape),
            "bits": stack.bits(module),
            "reason": work.recipe.reason(module),
        }
        for stack in work.stacks
        for module, entry in stack.members.items()
    ]
    return {
        "layers": layers,
        "copied": [entry.name for entry, _ in work.uncompressed],
        "left_alone": [
            {"name": e.name, "bytes": e.nbytes, "reason": reason} for e, reason in work.uncompressed
        ],
        "shards": [{"name": shard.name, "bytes": shard.header.nbytes} for shard in work.shards],
        "files": work.file_sizes,
        "before": work.source_bytes,
        "after": work.output_bytes,
        "memory": needs.memory,
        "scratch": needs.scratch,
        "data": work.recipe.calibrated,
        "digest": work.digest,
        "warnings": list(work.warnings),
        "device": work.device.name,
        "hardware": [{"scheme": name, **attrs.asdict(f)} for name, f in work.findings],
        "tensor_parallel": needs.ranks,
        "world_size": len(needs.shares),
        "threads": needs.threads,
        "seconds": needs.seconds,
        "ranks": [attrs.asdict(share) for share in needs.shares],
        "serving": [
            {"layers": r.layers, "count": r.count, **attrs.asdict(r.finding)} for r in needs.remarks
        ],
    }


def remarks(work: Plan, warnings: Iterable[str], serving: Iterable[Remark]) -> None:
    """Warnings and unfavourable findings, on standard error."""
    warn(warnings)
    warn(unfavourable(work))
    said = [
        (f"{r.layers}{f' ({r.count} layers)' if r.count > 1 else ''}: {r.finding.level}", r.finding)
        for r in serving
    ]
    warn(f"{what}: {finding.text}" for what, finding in said if finding.level not in USABLE)


def _mean_bits(stack: Any) -> float:
    sizes = {module: entry.numel for module, entry in stack.members.items()}
    return float(sum(stack.bits(m) * n for m, n in sizes.items()) / sum(sizes.values()))


def _steps(steps: Sequence[Step]) -> str:
    return " + ".join(step.scheme.name for step in steps)


def _step_json(step: Step) -> dict[str, Any]:
    return {"use": step.scheme.name, **attrs.asdict(step.options)}
