"""The page: tiles, charts and tables, each made of the manifest's figures."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from importlib import resources

from bitpress.checkpoint import filenames
from bitpress.checkpoint.layer_names import BLOCK, NUMBER
from bitpress.errors import BitpressError
from bitpress.output.manifest import LayerRecord, Manifest
from bitpress.output.report import charts
from bitpress.planning.recipe import parse_rules
from bitpress.schemes import hardware
from bitpress.schemes.registry import discover
from bitpress.schemes.values import Finding

# of a block
INDEX = re.compile(rf"\.({NUMBER.pattern})$")

START = "<!doctype html>"

# layers listed; all are in a table that folds out
WORST = 12

Row = Sequence[object]


def page(note: Manifest, name: str) -> str:
    """The HTML of an output of that name.

    Raises:
        BitpressError: matplotlib is not installed.
    """
    parts = [
        make(note)
        for make in (_tiles, _sizes, _errors, _drift, _worst, _hardware, _settings, _provenance)
    ]
    style = resources.files("bitpress.output.report").joinpath("style.css").read_text()
    title, made = (
        html.escape(name),
        html.escape(f"{note.source} compressed with {' + '.join(note.schemes)}"),
    )
    return (
        f'{START}\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, '
        f'initial-scale=1">\n<style>\n{style}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n<p>{made}</p>\n"
        + "\n".join(filter(None, parts))
        + "\n</body></html>\n"
    )


def _tiles(note: Manifest) -> str:
    before, after = _bytes(note)
    tiles = [
        (f"{before / after:.2f}x", f"smaller: {_size(before)} to {_size(after)}"),
        (f"{note.bits:.2f}", f"bits per weight in {len(note.layers)} layers"),
    ]
    errors = [layer.error for layer in note.layers.values() if layer.error is not None]
    tiles.append(
        (f"{max(errors):.2%}", "largest error of a weight, verified")
        if errors
        else ("not verified", "written with --no-verify")
    )
    if note.check and note.check.kl is not None and note.check.top1 is not None:
        tiles += [
            (f"{note.check.kl:.4f}", f"KL divergence, nats per token of {note.check.tokens:,}"),
            (f"{note.check.top1:.1%}", "top-1 agreement with the source"),
            (
                f"{note.check.perplexity:.3f}",
                f"perplexity; the source's {note.check.source_perplexity:.3f}",
            ),
        ]
    cells = "".join(
        f'<div class="tile"><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>'
        for big, small in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _sizes(note: Manifest) -> str:
    before, after = (size / 1e6 for size in _bytes(note))
    return _section(
        "Size", charts.bars({"source": before, "result": after}, "MB"), "Weight files on disk."
    )


def _errors(note: Manifest) -> str:
    found = []
    for title, key, text in (
        (
            "Error of each layer's weight",
            "error",
            "|restored − source| / |source|, measured on the written files.",
        ),
        (
            "Error of each layer's output",
            "output_error",
            "|W x − Q x| / |W x| on calibration inputs: what the error of the weight does to what "
            "the layer gives.",
        ),
    ):
        points: dict[str, list[tuple[int, float]]] = {}
        for name, layer in note.layers.items():
            place, value = BLOCK.fullmatch(f"{name}.weight"), getattr(layer, key)
            if place and value is not None:
                points.setdefault(name.rpartition(".")[2], []).append((int(place["index"]), value))
        if points:
            found.append(_section(title, charts.by_block(points, "relative error"), text))
    return "\n".join(found)


def _drift(note: Manifest) -> str:
    drawn = {}
    if note.blocks:
        drawn["calibration data"] = [
            (int(found[1]), error) for n, error in note.blocks.items() if (found := INDEX.search(n))
        ]
    if note.check and note.check.drift:
        drawn["the check's text"] = list(enumerate(note.check.drift))
    text = (
        "|h − h′| / |h′| of the hidden states after each block, h′ being the source's: how errors "
        "add up on the way."
    )
    return (
        _section("How far hidden states drift", charts.by_block(drawn, "relative distance"), text)
        if drawn
        else ""
    )


def _worst(note: Manifest) -> str:
    def size(layer: LayerRecord) -> float:
        return layer.output_error if layer.output_error is not None else layer.error or 0.0

    rows = [
        (
            f"<code>{html.escape(name)}</code>",
            html.escape(" + ".join(n.steps)),
            f"{n.bits:.2f}",
            _share(n.error),
            _share(n.output_error),
        )
        for name, n in sorted(note.layers.items(), key=lambda item: -size(item[1]))
    ]
    head = ("layer", "steps", "#bits per weight", "#error", "#output error")
    every = (
        f"<details><summary>All {len(rows)} layers</summary>{_table(head, rows)}</details>"
        if len(rows) > WORST
        else ""
    )
    return _section(
        "Worst layers",
        _table(head, rows[:WORST]) + every,
        "A rule with other steps for these helps most.",
    )


def _hardware(note: Manifest) -> str:
    registry = discover()
    rows: dict[tuple[str, Finding], list[str]] = {}
    for rule in parse_rules(note.recipe, filenames.MANIFEST):
        for scheme, values in rule.steps:
            try:
                made = registry.get(scheme).step(values)
                said = [
                    (d.name, f)
                    for d in hardware.DEVICES
                    for f in list(made.call("validate_hardware", hardware=d) or ())[:1]
                ]
            except BitpressError as e:
                said = [("all devices", Finding("unsupported", f"not known here: {e}"))]
            for device, finding in said:
                rows.setdefault((scheme, finding), []).append(device)
    cells = [
        (
            html.escape(scheme),
            f'<span class="{f.level}">{f.level}</span>',
            html.escape(", ".join(devices)),
            html.escape(f.text),
        )
        for (scheme, f), devices in rows.items()
    ]
    return _section(
        "Where it serves", _table(("scheme", "level", "devices", "what to expect"), cells)
    )


def _settings(note: Manifest) -> str:
    recipe = html.escape(json.dumps(note.recipe, indent=2))
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in note.warnings)
    told = (
        f"<details><summary>{len(note.warnings)} warnings of the run</summary><ul>"
        f"{warnings}</ul></details>"
        if warnings
        else ""
    )
    return _section(
        "Settings",
        f"<pre><code>{recipe}</code></pre>{told}",
        "The recipe, with every option spelled out.",
    )


def _provenance(note: Manifest) -> str:
    facts = {"source": note.source, "bitpress": note.bitpress, **note.schemes}
    if note.data:
        facts["calibrated on"] = f"{int(note.data['tokens']):,} tokens of {note.data['source']}"
    if note.check:
        facts["checked on"] = (
            f"{note.check.tokens:,} tokens of {note.check.text}, in sequences of "
            f"{note.check.sequence_length}"
        )
    made = _table(
        ("", ""), [(html.escape(key), html.escape(value)) for key, value in facts.items()]
    )
    files = [
        (
            f"<code>{html.escape(name)}</code>",
            where,
            f"{file.bytes:,}",
            f"<code>{file.sha256 or '-'}</code>",
        )
        for where, notes in (("source", note.inputs), ("result", note.files))
        for name, file in notes.items()
    ]
    listed = _table(("file", "of", "#bytes", "SHA-256"), files)
    return _section(
        "Provenance", f"{made}<details><summary>{len(files)} files</summary>{listed}</details>"
    )


def _section(title: str, content: str, text: str = "") -> str:
    content = f"<figure>{content}</figure>" if content.startswith("<svg") else content
    return (
        f"<h2>{html.escape(title)}</h2>\n"
        + (f"<p>{html.escape(text)}</p>\n" if text else "")
        + content
    )


def _table(head: Sequence[str], rows: Iterable[Row]) -> str:
    """Columns whose heads begin with # hold numbers; cells are HTML."""
    kinds = [' class="number"' if name.startswith("#") else "" for name in head]
    top = "".join(
        f"<th{kind}>{html.escape(name.lstrip('#'))}</th>"
        for name, kind in zip(head, kinds, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{c}</td>" for c, k in zip(row, kinds, strict=True)) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide"><table>{f"<tr>{top}</tr>" if any(head) else ""}\n{body}</table></div>'
    )


def _bytes(note: Manifest) -> tuple[int, int]:
    return sum(f.bytes for f in note.inputs.values()), sum(
        f.bytes for n, f in note.files.items() if n.endswith(".safetensors")
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
