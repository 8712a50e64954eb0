"""What commands print for people, and the same as JSON values."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from bitpress.cli import terminal
from bitpress.errors import BitpressError
from bitpress.hardware import Hardware
from bitpress.layer import Finding
from bitpress.options import choices
from bitpress.schemes import Registry, Step

if TYPE_CHECKING:
    from bitpress.manifest import Check, Manifest
    from bitpress.planning import Plan

USABLE = ("recommended", "supported")


def registry(found: Registry, devices: Sequence[Hardware]) -> None:
    """A table of installed schemes, and what is broken."""
    rows = []
    for scheme in found.schemes.values():
        step = scheme.step()
        data = "needed" if scheme.calibrated(step.options) else "none"
        rows.append(
            (scheme.name, f"{scheme.package} {scheme.version}", _bits(step), data, _serves(step, devices), scheme.summary)
        )
    _table(("scheme", "package", "bits", "data", "serves on", "what it does"), rows)
    if not rows:
        print("no schemes are installed; each is a package of its own: pip install bitpress-scheme-NAME")
    for problem in found.problems:
        print(f"problem: {problem.name} of {problem.package} cannot be used: {problem.text}", file=sys.stderr)


def registry_json(found: Registry, devices: Sequence[Hardware]) -> dict[str, Any]:
    """The same as JSON."""
    schemes = [scheme_json(scheme.step(), devices) for scheme in found.schemes.values()]
    return {"schemes": schemes, "problems": [attrs.asdict(problem) for problem in found.problems]}


def scheme(step: Step, devices: Sequence[Hardware]) -> None:
    """One scheme's options and what it says of devices."""
    value = scheme_json(step, devices)
    print(f"{value['name']} ({value['package']} {value['version']}): {value['summary']}\n")
    rows = [(name, o["values"], o["default"], o["help"]) for name, o in value["options"].items()]
    _table(("option", "values", "default", "what it sets"), rows)
    print()
    grouped: dict[tuple[str, str], list[str]] = {}
    for finding in value["hardware"]:
        grouped.setdefault((finding["level"], finding["text"]), []).append(finding["device"])
    _table(("level", "what to expect", "devices"), [(*finding, ", ".join(names)) for finding, names in grouped.items()])


def scheme_json(step: Step, devices: Sequence[Hardware]) -> dict[str, Any]:
    """One scheme as JSON."""
    from typing import get_type_hints

    scheme, hints = step.scheme, get_type_hints(step.scheme.options_type)
    options = {
        field.name: {
            "values": choices(hints[field.name]),
            "default": _plain(getattr(step.options, field.name)),
            "help": field.metadata.get("help", ""),
        }
        for field in attrs.fields(scheme.options_type)
    }
    findings = [{"device": device.name, **attrs.asdict(finding)} for device in devices for finding in _findings(step, device)]
    return {
        "name": scheme.name, "package": scheme.package, "version": scheme.version, "summary": scheme.summary,
        "bits": step.options.bits, "data": scheme.calibrated(step.options), "options": options, "hardware": findings,
    }  # fmt: skip


def plan(work: Plan, memory: int) -> None:
    """A table of stacks, sizes before and after, memory, and remarks."""
    rows = [(stack.name, _steps(stack.steps), f"{_mean_bits(stack):.2f}") for stack in work.stacks]
    _table(("layers", "steps", "bits per weight"), rows)
    count = sum(len(stack.members) for stack in work.stacks)
    print(f"\n{count} layers compressed, {sum(len(s.copies) for s in work.shards)} tensors copied unchanged")
    print(f"size    {_gb(work.bytes_before)} -> {_gb(work.bytes_after)} ({work.bytes_before / work.bytes_after:.2f}x smaller)")
    print(f"memory  about {_gb(memory)}, torch included")
    remarks(work)


def plan_json(work: Plan, memory: int) -> dict[str, Any]:
    """The plan as JSON."""
    layers = [
        {
            "name": module,
            "steps": [_step_json(s) for s in stack.steps],
            "stack": stack.name,
            "shape": list(entry.shape),
            "bits": stack.bits(module),
        }
        for stack in work.stacks
        for module, entry in stack.members.items()
    ]
    return {
        "layers": layers, "copied": [entry.name for shard in work.shards for entry in shard.copies],
        "shards": [{"name": shard.name, "bytes": shard.header.nbytes} for shard in work.shards],
        "before": work.bytes_before, "after": work.bytes_after, "memory": memory, "digest": work.digest,
        "warnings": list(work.warnings), "hardware": [{"scheme": name, **attrs.asdict(f)} for name, f in work.findings],
    }  # fmt: skip


def remarks(work: Plan, warnings: Iterable[str] | None = None) -> None:
    """Warnings (the plan's, if no others are given) and unfavourable findings, on standard error."""
    for warning in work.warnings if warnings is None else warnings:
        print(f"warning: {terminal.plain(warning)}", file=sys.stderr)
    for name, finding in work.findings:
        if finding.level not in USABLE:
            print(f"warning: {name} is {finding.level} on this machine's device: {finding.text}", file=sys.stderr)


def summary(note: Manifest, work: Plan, out: Path, verified: bool) -> None:
    """What `compress` did."""
    ratio = work.bytes_before / work.bytes_after
    print(f"{out}: {_gb(work.bytes_before)} -> {_gb(work.bytes_after)} ({ratio:.2f}x smaller), {note.bits:.2f} bits per weight")
    for text in note.warnings:
        print(f"warning: {terminal.plain(text)}", file=sys.stderr)
    if note.data:
        hint = "; texts like those the model will serve are better: --calibration FILE" if "ships" in note.data["source"] else ""
        print(f"calibrated on {int(note.data['tokens']):,} tokens of {note.data['source']}{hint}")
    measured = {name: layer.output_error for name, layer in note.layers.items() if layer.output_error is not None}
    if measured:
        print("largest relative errors of a layer's output on calibration data:")
        _table(("layer", "output error"), [(n, f"{e:.5f}") for n, e in sorted(measured.items(), key=lambda i: -i[1])[:5]])
    if verified:
        worst = sorted(note.layers.items(), key=lambda item: -(item[1].error or 0))[:5]
        print(f"verified: {len(note.layers)} layers read back and compared with the source; largest relative errors:")
        _table(("layer", "error"), [(name, f"{layer.error:.5f}") for name, layer in worst])
    else:
        print("not verified (--no-verify)")
    print(f"serve it: vllm serve {out}")


def manifest(note: Manifest) -> None:
    """What is inside an output."""
    print(terminal.plain(f"from {note.source}, by bitpress {note.bitpress} with {', '.join(note.schemes.values())}"))
    rows = [
        (name, " + ".join(layer.steps), f"{layer.bits:.2f}", "-" if layer.error is None else f"{layer.error:.5f}")
        for name, layer in note.layers.items()
    ]
    _table(("layer", "steps", "bits per weight", "relative error"), rows)
    print(f"\n{len(rows)} layers, {note.bits:.2f} bits per weight")


def check(found: Check) -> None:
    """How well a model predicts a text, and how far it is from another."""
    print(f"{found.tokens:,} tokens of {found.text} in sequences of {found.sequence_length}")
    if found.kl is None:
        print(f"perplexity       {found.perplexity:.4f}")
        return
    print(
        f"perplexity       {found.perplexity:.4f}, the source's {found.source_perplexity:.4f} ({found.rise:+.6f} nats per token)"
    )
    print(f"KL divergence    {found.kl:.6f} nats per token")
    print(f"top-1 agreement  {found.top1:.3%}")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns of text; the last one is folded where the terminal is too narrow."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*(terminal.plain(str(cell)) for cell in row))
    console = Console()
    if table.row_count:
        Console(width=None if console.is_terminal else 200, markup=False, highlight=False).print(table)


def _findings(step: Step, device: Hardware) -> Sequence[Finding]:
    try:
        found = step.call("validate_hardware", hardware=device)
    except BitpressError as e:  # one scheme's fault must not hide the others
        return [Finding("unsupported", str(e))]
    return found or [Finding("unsupported", "the scheme says nothing about hardware")]


def _serves(step: Step, devices: Sequence[Hardware]) -> str:
    """In a few words where a scheme is supported or better: `NVIDIA 8.9+, some AMD`."""
    usable = [device for device in devices if _findings(step, device)[0].level in USABLE]
    if len(devices) == 1:
        return _findings(step, devices[0])[0].level
    words = []
    for vendor in dict.fromkeys(device.vendor for device in devices):
        count = sum(device.vendor == vendor for device in devices)
        mine = [device for device in usable if device.vendor == vendor]
        if mine and vendor == "nvidia":
            words.append("NVIDIA {}.{}+".format(*min(device.capability or (0, 0) for device in mine)))
        elif mine:
            name = vendor.upper() if vendor in ("amd", "cpu") else vendor.capitalize()
            words.append(name if len(mine) == count else f"some {name}")
    return ", ".join(words) or "nothing known"


def _bits(step: Step) -> str:
    return "-" if step.options.bits is None else f"{step.options.bits:g}"


def _mean_bits(stack: Any) -> float:
    sizes = {module: entry.numel for module, entry in stack.members.items()}
    return float(sum(stack.bits(m) * n for m, n in sizes.items()) / sum(sizes.values()))


def _steps(steps: Sequence[Step]) -> str:
    return " + ".join(step.scheme.name for step in steps)


def _step_json(step: Step) -> dict[str, Any]:
    return {"use": step.scheme.name, **attrs.asdict(step.options)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
