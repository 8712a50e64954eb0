"""How results are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from bitpress.errors import BitpressError, plain
from bitpress.schemes.hardware import KNOWN, Hardware
from bitpress.schemes.options import choices
from bitpress.schemes.registry import Registry, Step
from bitpress.schemes.values import Finding

if TYPE_CHECKING:
    from bitpress.output.manifest import Check, Manifest
    from bitpress.planning.plan import Plan

if TYPE_CHECKING:
    from bitpress.compression.search.result import Found

USABLE = ("recommended", "supported")


def registry(found: Registry, devices: Sequence[Hardware]) -> None:
    """A table of installed schemes, and what is broken."""
    rows = []
    for scheme in found.schemes.values():
        step = scheme.step()
        data = "needed" if scheme.calibrated(step.options) else "none"
        rows.append(
            (
                scheme.name,
                f"{scheme.package} {scheme.version}",
                _bits(step),
                data,
                serves(step, devices),
                scheme.summary,
            )
        )
    table(("scheme", "package", "bits", "data", "serves on", "what it does"), rows)
    if not rows:
        print(
            "no schemes are installed; each is a package of its own: pip install "
            "bitpress-scheme-NAME"
        )
    for problem in found.problems:
        print(
            f"problem: {problem.name} of {problem.package} cannot be used: {problem.text}",
            file=sys.stderr,
        )


def registry_json(found: Registry, devices: Sequence[Hardware]) -> dict[str, Any]:
    """The same as JSON."""
    schemes = [scheme_json(scheme.step(), devices) for scheme in found.schemes.values()]
    return {"schemes": schemes, "problems": [attrs.asdict(problem) for problem in found.problems]}


def scheme(step: Step, devices: Sequence[Hardware]) -> None:
    """One scheme's options and what it says of devices."""
    value = scheme_json(step, devices)
    print(f"{value['name']} ({value['package']} {value['version']}): {value['summary']}\n")
    rows = [(name, o["values"], o["default"], o["help"]) for name, o in value["options"].items()]
    table(("option", "values", "default", "what it sets"), rows)
    print()
    grouped: dict[tuple[str, str], list[str]] = {}
    for finding in value["hardware"]:
        grouped.setdefault((finding["level"], finding["text"]), []).append(finding["device"])
    table(
        ("level", "what to expect", "devices"),
        [(*finding, ", ".join(names)) for finding, names in grouped.items()],
    )


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
    findings = [
        {"device": device.name, **attrs.asdict(finding)}
        for device in devices
        for finding in _findings(step, device)
    ]
    return {
        "name": scheme.name,
        "package": scheme.package,
        "version": scheme.version,
        "summary": scheme.summary,
        "bits": step.options.bits,
        "data": scheme.calibrated(step.options),
        "options": options,
        "hardware": findings,
    }


def warn(texts: Iterable[str]) -> None:
    """One line each, on standard error."""
    for text in texts:
        print(f"warning: {plain(text)}", file=sys.stderr)


def summary(note: Manifest, work: Plan, out: Path, verified: bool) -> None:
    """What `compress` did."""
    ratio = work.source_bytes / work.output_bytes
    print(
        f"{out}: {gb(work.source_bytes)} -> {gb(work.output_bytes)} ({ratio:.2f}x smaller), "
        f"{note.bits:.2f} bits per weight"
    )
    warn(note.warnings)
    if note.data:
        hint = (
            "; texts like those the model will serve are better: --calibration FILE"
            if "ships" in note.data["source"]
            else ""
        )
        print(f"calibrated on {int(note.data['tokens']):,} tokens of {note.data['source']}{hint}")
    sent = sorted(layer.tokens for layer in note.layers.values() if layer.tokens is not None)
    if sent:
        middle = sent[(len(sent) - 1) // 2]
        print(
            f"tokens sent to an expert: {sent[0]:,} to {sent[-1]:,}, to half of them at most "
            f"{middle:,}"
        )
    measured = {
        name: layer.output_error
        for name, layer in note.layers.items()
        if layer.output_error is not None
    }
    if measured:
        print("largest relative errors of a layer's output on calibration data:")
        table(
            ("layer", "output error"),
            [(n, f"{e:.5f}") for n, e in sorted(measured.items(), key=lambda i: -i[1])[:5]],
        )
    if verified:
        worst = sorted(note.layers.items(), key=lambda item: -(item[1].error or 0))[:5]
        print(
            f"verified: {len(note.layers)} layers read back and compared with the source; largest "
            "relative errors:"
        )
        table(("layer", "error"), [(name, f"{layer.error:.5f}") for name, layer in worst])
    else:
        print("not verified (--no-verify)")
    if note.check:
        print("checked, run as it will be served: ", end="")
        check(note.check)
    for text in unfavourable(work):
        print(text)
    print(f"serve it: vllm serve {out}")


def manifest(note: Manifest) -> None:
    """What is inside an output."""
    print(
        plain(
            f"from {note.source}, by bitpress {note.bitpress} with "
            f"{', '.join(note.schemes.values())}"
        )
    )
    rows = [
        (
            name,
            " + ".join(layer.steps),
            f"{layer.bits:.2f}",
            _figure(layer.error),
            _figure(layer.output_error),
        )
        for name, layer in note.layers.items()
    ]
    measured = any(layer.output_error is not None for layer in note.layers.values())
    head, count = (
        ("layer", "steps", "bits per weight", "relative error", "output error"),
        5 if measured else 4,
    )
    table(head[:count], [row[:count] for row in rows])
    print(f"\n{len(rows)} layers, {note.bits:.2f} bits per weight")
    if note.blocks:
        print(
            f"hidden states after the last block are {list(note.blocks.values())[-1]:.5f} from the "
            "source's on calibration data"
        )
    if note.check:
        print("checked on ", end="")
        check(note.check)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def check(found: Check) -> None:
    """How well a model predicts a text, and how far it is from another."""
    print(f"{found.tokens:,} tokens of {found.text} in sequences of {found.sequence_length}")
    if found.kl is None:
        print(f"perplexity       {found.perplexity:.4f}")
        return
    print(
        f"perplexity       {found.perplexity:.4f}, the source's {found.source_perplexity:.4f} "
        f"({found.rise:+.6f} nats per token)"
    )
    print(f"KL divergence    {found.kl:.6f} nats per token")
    print(f"top-1 agreement  {found.top1:.3%}")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns of text; the last one is folded where the terminal is too narrow."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*(plain(str(cell)) for cell in row))
    console = Console()
    if table.row_count:
        Console(width=None if console.is_terminal else 200, markup=False, highlight=False).print(
            table
        )


def unfavourable(work: Plan) -> Sequence[str]:
    """What the device makes of the schemes, where it is not good news."""
    place = work.device.name if work.device in KNOWN else "this machine's device"
    return [
        f"{name} is {f.level} on {place}: {f.text}"
        for name, f in work.findings
        if f.level not in USABLE
    ]


def _findings(step: Step, device: Hardware) -> Sequence[Finding]:
    try:
        found = step.call("validate_hardware", hardware=device)
    except BitpressError as e:
        # one scheme's fault must not hide the others
        return [Finding("unsupported", str(e))]
    return found or [Finding("unsupported", "the scheme says nothing about hardware")]


def serves(step: Step, devices: Sequence[Hardware]) -> str:
    """In a few words where a scheme is supported or better: `NVIDIA 8.9+, some AMD`."""
    usable = [device for device in devices if _findings(step, device)[0].level in USABLE]
    if len(devices) == 1:
        return _findings(step, devices[0])[0].level
    words = []
    for vendor in dict.fromkeys(device.vendor for device in devices):
        count = sum(device.vendor == vendor for device in devices)
        mine = [device for device in usable if device.vendor == vendor]
        if mine and vendor == "nvidia":
            words.append(
                "NVIDIA {}.{}+".format(*min(device.capability or (0, 0) for device in mine))
            )
        elif mine:
            name = vendor.upper() if vendor in ("amd", "cpu") else vendor.capitalize()
            words.append(name if len(mine) == count else f"some {name}")
    return ", ".join(words) or "nothing known"


def _bits(step: Step) -> str:
    return "-" if step.options.bits is None else f"{step.options.bits:g}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def gb(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def search_table(found: Found, out: Path) -> None:
    """What every layer gets, and would lose by each scheme; what the whole loses, and would with
    one scheme everywhere.
    """
    search, names = found.search, list(found.search.candidates)
    rows = [
        (u.name, *(f"{found.damages[u.name, n]:.6f}" for n in names), found.chosen[u.name])
        for u in search.units
    ]
    print(
        f"nats per token that each layer costs by itself, on {found.tokens:,} tokens of "
        f"{search.data.source}:"
    )
    table(("layers", *names, "chosen"), rows)
    choices = [("chosen", found.chosen)] + [
        (f"{name} everywhere", found.everywhere(name)) for name in names
    ]
    rows = [
        (name, f"{found.bits(choice):.2f}", f"{found.damage(choice):.6f}")
        for name, choice in choices
    ]
    table(("", "bits per weight", "expected KL divergence"), rows)
    print(f"{out}: written; carry it out: bitpress compress {search.model} OUT --recipe {out}")


def search_json(found: Found, out: Path) -> dict[str, Any]:
    """The same as JSON."""
    search, names = found.search, list(found.search.candidates)
    return {
        "recipe": str(out),
        "budget": search.budget,
        "bits": found.bits(),
        "kl": found.damage(),
        "everywhere": {
            n: {"bits": found.bits(found.everywhere(n)), "kl": found.damage(found.everywhere(n))}
            for n in names
        },
        "layers": [
            {
                "name": u.name,
                "modules": u.modules,
                "chosen": found.chosen[u.name],
                "candidates": {
                    n: {"bytes": u.size(n), "kl": found.damages[u.name, n]} for n in names
                },
            }
            for u in search.units
        ],
        "text": search.data.source,
        "tokens": found.tokens,
    }
