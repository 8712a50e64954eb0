"""How a plan is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from bitpress.cli.scheme_output import serves
from bitpress.cli.text import print_notes, print_table, say, say_fact, say_what_is_left, warn
from bitpress.runtime.memory import format_bytes
from bitpress.schemes.hardware import DEVICES
from bitpress.schemes.registry import Step
from bitpress.schemes.values import USABLE

if TYPE_CHECKING:
    from bitpress.planning.effort import EffortCost
    from bitpress.planning.layout import Stack
    from bitpress.planning.memory_estimate import CalibrationMemory
    from bitpress.planning.plan import Plan
    from bitpress.planning.tensor_parallel import Remark
    from bitpress.planning.time_estimate import RankWork


@frozen
class DeviceMemory:
    """What a run holds of a GPU's memory.

    Attributes:
        whole: where blocks lie there.
        by_layer: bytes at least where blocks lie in the host's memory, and are brought layer by
            layer.
    """

    whole: CalibrationMemory
    by_layer: int


@frozen
class Requirements:
    """What carrying out a plan asks for.

    Attributes:
        memory: bytes of a process at least, Python and its libraries included.
        scratch: bytes on disk beside the output, where a process has no more memory than that.
        device_memory: of a GPU that computes; None where none is planned for.
        shares: what each process of the run does.
        num_threads: of each process.
        seconds: until the last of them is done, on CPUs like the one that rates were measured on.
        efforts: what every level of effort would choose, and how long it would take.
    """

    memory: int
    scratch: int
    device_memory: DeviceMemory | None
    shares: tuple[RankWork, ...]
    num_threads: int
    seconds: float
    efforts: tuple[EffortCost, ...]


@frozen(eq=False)
class PlanSummary:
    """A plan, what it asks for, and what engines will make of its result.

    Attributes:
        tensor_parallel: ranks of the engine that will serve the result.
        remarks: what that engine will make of the layers.
        lists_all: whether people see every layer and tensor, not those alike as one.
    """

    plan: Plan
    requirements: Requirements
    tensor_parallel: int
    remarks: tuple[Remark, ...]
    lists_all: bool = False

    def as_json(self) -> dict[str, Any]:
        """Every layer and every byte."""
        plan, requirements = self.plan, self.requirements
        return {
            "layers": _layers_json(plan),
            "copied": [entry.name for entry, _ in plan.uncompressed],
            "left_alone": [
                {"name": entry.name, "bytes": entry.nbytes, "reason": reason}
                for entry, reason in plan.uncompressed
            ],
            "shards": [{"name": shard.name, "bytes": shard.header.nbytes} for shard in plan.shards],
            "files": plan.file_sizes,
            "not_copied": plan.source.left_files,
            "before": plan.source_bytes,
            "after": plan.output_bytes,
            "memory": requirements.memory,
            "scratch": requirements.scratch,
            "device_memory": None
            if requirements.device_memory is None
            else {
                "by_layer": requirements.device_memory.by_layer,
                "least": requirements.device_memory.whole.on_disk,
                "with_hidden_states": requirements.device_memory.whole.in_memory,
            },
            "caches": [
                {"name": cache.module, "bytes_per_token": cache.token_bytes[1]}
                for cache in plan.caches
            ],
            "data": plan.calibrated,
            "digest": plan.digest,
            "warnings": list(plan.warnings),
            "device": plan.device.name,
            "hardware": [
                {"scheme": name, **attrs.asdict(finding)} for name, finding in plan.findings
            ],
            "tensor_parallel": self.tensor_parallel,
            "world_size": len(requirements.shares),
            "threads": requirements.num_threads,
            "seconds": requirements.seconds,
            "efforts": [attrs.asdict(effort) for effort in requirements.efforts],
            "ranks": [attrs.asdict(share) for share in requirements.shares],
            "serving": [
                {
                    "layers": remark.layers,
                    "count": remark.count,
                    **attrs.asdict(remark.finding),
                }
                for remark in self.remarks
            ],
        }

    def print_text(self) -> None:
        """Sizes before and after and what the run needs; then what is compressed and what is left
        alone, and why; and remarks.
        """
        _print_sizes(self.plan)
        _print_requirements(self.requirements)
        _print_efforts(self.requirements.efforts)
        _print_serving(self.plan)
        _print_layers(self.plan, self.lists_all)
        print_remarks(self.plan, self.plan.warnings, self.remarks)


def print_remarks(plan: Plan, warnings: Iterable[str], remarks: Iterable[Remark]) -> None:
    """What was taken for names of schemes, warnings and unfavorable findings, on standard error."""
    print_notes(plan.recipe.notes)
    warn(warnings)
    warn(plan.device_remarks)
    for remark in remarks:
        if remark.finding.level not in USABLE:
            count = f" ({remark.count} layers)" if remark.count > 1 else ""
            warn([f"{remark.layers}{count}: {remark.finding.level}: {remark.finding.text}"])


def _print_layers(plan: Plan, lists_all: bool) -> None:
    # it imports torch, which takes a second
    from bitpress.checkpoint.layer_names import collapse_numbered

    layers: list[tuple[str, tuple[str, ...]]] = []
    for stack in plan.stacks:
        steps = " + ".join(step.scheme.name for step in stack.steps)
        reason = plan.recipe.reason(next(iter(stack.members)))
        layers.append((stack.name, (steps, f"{_mean_bits(stack):.2f}", reason)))
    copies = [(entry.name, (reason,)) for entry, reason in plan.uncompressed]
    rows, copied_rows = (
        [(name, *cells) for name, cells, *_ in (items if lists_all else collapse_numbered(items))]
        for items in (layers, copies)
    )
    columns = ["layers", "steps", "bits per weight", "why"]
    if len({reason for *_, reason in rows}) <= 1:
        # one rule for all explains nothing
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(columns, rows)
    print_table((_describe_copies(plan), "why"), copied_rows)
    if len(rows) + len(copied_rows) < len(layers) + len(copies):
        say("every layer by itself: --all")


def _describe_copies(plan: Plan) -> str:
    return "rotated alone" if plan.recipe.rotates else "copied unchanged"


def _print_sizes(plan: Plan) -> None:
    # it imports torch, which takes a second
    from bitpress.planning import attention_caches, outer_layers

    num_layers = sum(len(stack.members) for stack in plan.stacks)
    say(
        f"{num_layers} layers compressed, {len(plan.uncompressed)} tensors {_describe_copies(plan)}"
    )
    before, after = plan.source_bytes, plan.output_bytes
    say_fact(
        "size", f"{format_bytes(before)} -> {format_bytes(after)} ({before / after:.2f}x smaller)"
    )
    say_fact(
        "output",
        f"{sum(plan.file_sizes.values()):,} bytes in {len(plan.file_sizes)} files; beside "
        "them bitpress.json and README.md",
    )
    for outer, entry in outer_layers.find_plain(plan.source, plan.fragments):
        size = format_bytes(entry.nbytes)
        say_fact(
            "outside",
            f"{size} of {outer.what} stay as they are: {outer.option} NAME compresses them",
        )
    if plan.caches:
        say_fact("cache", attention_caches.describe_caches(plan.caches))
    say_what_is_left(plan.source.left_files)


def _print_requirements(requirements: Requirements) -> None:
    """Memory, the largest share of the work, and the time that it may take."""
    from bitpress.planning import time_estimate

    shares = requirements.shares
    each = " each process" if len(shares) > 1 else ""
    spilled = ""
    if requirements.scratch:
        size = format_bytes(requirements.scratch)
        spilled = f"; with no more than that, {size} of hidden states go to disk"
    say_fact("memory", f"about {format_bytes(requirements.memory)}{each}, torch included{spilled}")

    if requirements.device_memory is not None:
        _print_device_memory(requirements.device_memory)

    num_tokens = max(share.tokens for share in shares)
    reads, writes = (max(getattr(share, name) for share in shares) for name in ("reads", "writes"))
    rates = [
        f"reads {format_bytes(int(time_estimate.READ_RATE))}",
        f"proves {format_bytes(int(time_estimate.VERIFY_RATE))}",
    ]
    calibration = ""
    if num_tokens:
        products = max(share.products for share in shares)
        solutions = sum(share.solutions for share in shares)
        calibration = (
            f"; {products / 1e12:,.3g} TFLOP on {num_tokens:,} tokens, "
            f"{solutions / 1e12:,.3g} to fit layers"
        )
        rates += [
            f"computes {time_estimate.PRODUCT_RATE / 1e9:g} GFLOP",
            f"fits {time_estimate.SOLVE_RATE / 1e9:g}",
        ]
    who = f"each of {len(shares)} processes at most: " if len(shares) > 1 else ""
    say_fact(
        "work", f"{who}{format_bytes(reads)} read, {format_bytes(writes)} written{calibration}"
    )
    threads = f"{requirements.num_threads} thread{'s' * (requirements.num_threads > 1)}"
    if len(shares) > 1:
        threads += " each"
    say_fact(
        "time",
        f"about {format_duration(requirements.seconds)} with {threads}, where in a second a core "
        f"{', '.join(rates)}",
    )


def _print_device_memory(device_memory: DeviceMemory) -> None:
    whole = device_memory.whole
    least, by_layer = format_bytes(whole.on_disk), format_bytes(device_memory.by_layer)
    states = format_bytes(whole.in_memory - whole.on_disk)
    say_fact(
        "gpu",
        f"about {least} of its memory with --device cuda, or {by_layer} where blocks are brought "
        f"there layer by layer; hidden states take {states} more where there is room for them",
    )


def _print_efforts(efforts: Sequence[EffortCost]) -> None:
    """A line for each level; one for all where they do the same."""
    if not any(effort.settings or effort.refusal for effort in efforts):
        say_fact("effort", f"{', '.join(effort.level for effort in efforts)} do the same here")
        return
    for previous, effort in zip((None, *efforts), efforts, strict=False):
        if effort.refusal is not None:
            text = f"cannot be planned: {effort.refusal}"
        elif previous is not None and effort == attrs.evolve(previous, level=effort.level):
            text = f"as {previous.level}"
        else:
            data = "" if effort.needs_data else "no data, "
            text = f"{data}about {format_duration(effort.seconds)} ({' '.join(effort.settings)})"
        say_fact("effort", f"{effort.level}: {text}")


def _print_serving(plan: Plan) -> None:
    data = "needed: texts like those that it will serve (--calibration)"
    say_fact("data", data if plan.calibrated else "none needed")
    for step in {step.scheme.name: step for step in plan.recipe.all_steps}.values():
        say_fact("serves", f"{step.scheme.name}: {serves(step, DEVICES)}")
    for name, finding in plan.findings if plan.device in DEVICES else ():
        say_fact("device", f"{plan.device.name}: {name} is {finding.level}, {finding.text}")


def format_duration(seconds: float) -> str:
    """`2.5 h`, in the largest unit of which there are two at least, to two digits."""
    unit, size = "s", 1
    for larger_unit, larger_size in (("min", 60), ("h", 3600), ("days", 86400)):
        if seconds >= 2 * larger_size:
            unit, size = larger_unit, larger_size
    rounded = float(f"{seconds / size:.2g}")
    return f"{rounded:g} {unit}"


def _layers_json(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": module,
            "steps": [_step_json(step) for step in stack.steps],
            "stack": stack.name,
            "shape": list(entry.shape),
            "bits": stack.bits(module),
            "reason": plan.recipe.reason(module),
        }
        for stack in plan.stacks
        for module, entry in stack.members.items()
    ]


def _step_json(step: Step) -> dict[str, Any]:
    return {"use": step.scheme.name, **attrs.asdict(step.options)}


def _mean_bits(stack: Stack) -> float:
    num_weights = {module: entry.numel for module, entry in stack.members.items()}
    num_bits = sum(stack.bits(module) * count for module, count in num_weights.items())
    return float(num_bits / sum(num_weights.values()))
