"""The page: tiles, charts and tables, each made of the manifest's figures."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from bitpress.checkpoint import filenames
from bitpress.checkpoint.layer_names import BLOCK, NUMBER
from bitpress.errors import BitpressError
from bitpress.output.manifest import FileRecord, LayerRecord, Manifest
from bitpress.output.report import charts
from bitpress.planning.recipe import parse_rules
from bitpress.schemes import hardware
from bitpress.schemes.registry import Registry, discover
from bitpress.schemes.values import Finding

# The number of a block at the end of its name.
BLOCK_NUMBER = re.compile(rf"\.({NUMBER.pattern})$")

DOCTYPE = "<!doctype html>"

# Layers in the table of the worst; all are in one that folds out.
NUM_WORST = 12

Row = Sequence[object]


def render_page(manifest: Manifest, name: str) -> str:
    """The HTML of an output of that name.

    Raises:
        BitpressError: matplotlib is not installed.
    """
    sections = [
        render(manifest)
        for render in (
            _tiles,
            _sizes,
            _errors,
            _drift,
            _worst_layers,
            _hardware,
            _settings,
            _provenance,
        )
    ]
    style = resources.files("bitpress.output.report").joinpath("style.css").read_text()
    title = html.escape(name)
    schemes = " + ".join(manifest.schemes)
    summary = html.escape(f"{manifest.source} compressed with {schemes}")
    return (
        f'{DOCTYPE}\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, '
        f'initial-scale=1">\n<style>\n{style}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n<p>{summary}</p>\n"
        + "\n".join(filter(None, sections))
        + "\n</body></html>\n"
    )


def _tiles(manifest: Manifest) -> str:
    before, after = _weight_bytes(manifest)
    tiles = [
        (f"{before / after:.2f}x", f"smaller: {_format_bytes(before)} to {_format_bytes(after)}"),
        (f"{manifest.bits:.2f}", f"bits per weight in {len(manifest.layers)} layers"),
    ]
    errors = [layer.error for layer in manifest.layers.values() if layer.error is not None]
    if errors:
        tiles.append((f"{max(errors):.2%}", "largest error of a weight, verified"))
    else:
        tiles.append(("not verified", "written with --no-verify"))

    check = manifest.check
    if check and check.kl is not None and check.top1 is not None:
        tiles += [
            (f"{check.kl:.4f}", f"KL divergence, nats per token of {check.tokens:,}"),
            (f"{check.top1:.1%}", "top-1 agreement with the source"),
            (f"{check.perplexity:.3f}", f"perplexity; the source's {check.source_perplexity:.3f}"),
        ]
    cells = "".join(
        f'<div class="tile"><b>{html.escape(figure)}</b><span>{html.escape(text)}</span></div>'
        for figure, text in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _sizes(manifest: Manifest) -> str:
    before, after = (num_bytes / 1e6 for num_bytes in _weight_bytes(manifest))
    chart = charts.draw_bars({"source": before, "result": after}, "MB")
    return _section("Size", chart, "Weight files on disk.")


def _errors(manifest: Manifest) -> str:
    weights = _error_chart(
        manifest,
        "Error of each layer's weight",
        "error",
        "|restored − source| / |source|, measured on the written files.",
    )
    outputs = _error_chart(
        manifest,
        "Error of each layer's output",
        "output_error",
        "|W x − Q x| / |W x| on calibration inputs: what the error of the weight does to what the "
        "layer gives.",
    )
    return "\n".join(filter(None, (weights, outputs)))


def _error_chart(manifest: Manifest, title: str, field: str, text: str) -> str:
    """A chart of one field of the layers' records, a series for each kind of layer; nothing where
    no layer has it.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for name, layer in manifest.layers.items():
        match, error = BLOCK.fullmatch(f"{name}.weight"), getattr(layer, field)
        if match and error is not None:
            series = points.setdefault(name.rpartition(".")[2], [])
            series.append((int(match["index"]), error))
    return _section(title, charts.draw_by_block(points, "relative error"), text) if points else ""


def _drift(manifest: Manifest) -> str:
    points: dict[str, list[tuple[int, float]]] = {}
    if manifest.blocks:
        matches = [(BLOCK_NUMBER.search(name), drift) for name, drift in manifest.blocks.items()]
        points["calibration data"] = [(int(match[1]), drift) for match, drift in matches if match]
    if manifest.check and manifest.check.drift:
        points["the check's text"] = list(enumerate(manifest.check.drift))
    if not points:
        return ""
    return _section(
        "How far hidden states drift",
        charts.draw_by_block(points, "relative distance"),
        "|h − h′| / |h′| of the hidden states after each block, h′ being the source's: how errors "
        "add up on the way.",
    )


def _worst_layers(manifest: Manifest) -> str:
    def error(layer: LayerRecord) -> float:
        return layer.output_error if layer.output_error is not None else layer.error or 0.0

    by_error = sorted(manifest.layers.items(), key=lambda item: -error(item[1]))
    rows = [
        (
            f"<code>{html.escape(name)}</code>",
            html.escape(" + ".join(layer.steps)),
            f"{layer.bits:.2f}",
            _format_error(layer.error),
            _format_error(layer.output_error),
        )
        for name, layer in by_error
    ]
    head = ("layer", "steps", "#bits per weight", "#error", "#output error")
    content = _table(head, rows[:NUM_WORST])
    if len(rows) > NUM_WORST:
        content += _fold(f"All {len(rows)} layers", _table(head, rows))
    return _section("Worst layers", content, "A rule with other steps for these helps most.")


def _hardware(manifest: Manifest) -> str:
    registry = discover()
    # devices by what a scheme finds of them
    devices: dict[tuple[str, Finding], list[str]] = {}
    for rule in parse_rules(manifest.recipe, filenames.MANIFEST):
        for scheme, options in rule.steps:
            for device, finding in _find_hardware(registry, scheme, options):
                devices.setdefault((scheme, finding), []).append(device)
    rows = [
        (
            html.escape(scheme),
            f'<span class="{finding.level}">{finding.level}</span>',
            html.escape(", ".join(names)),
            html.escape(finding.text),
        )
        for (scheme, finding), names in devices.items()
    ]
    head = ("scheme", "level", "devices", "what to expect")
    return _section("Where it serves", _table(head, rows))


def _find_hardware(
    registry: Registry, scheme: str, options: Mapping[str, object]
) -> list[tuple[str, Finding]]:
    """Devices, and the first that a scheme finds of each."""
    try:
        step = registry.get(scheme).step(options)
        return [
            (device.name, finding)
            for device in hardware.DEVICES
            for finding in list(step.call("validate_hardware", hardware=device) or ())[:1]
        ]
    except BitpressError as e:
        return [("all devices", Finding("unsupported", f"not known here: {e}"))]


def _settings(manifest: Manifest) -> str:
    recipe = html.escape(json.dumps(manifest.recipe, indent=2))
    content = f"<pre><code>{recipe}</code></pre>"
    warnings = "".join(f"<li>{html.escape(text)}</li>" for text in manifest.warnings)
    if warnings:
        title = f"{len(manifest.warnings)} warnings of the run"
        content += _fold(title, f"<ul>{warnings}</ul>")
    return _section("Settings", content, "The recipe, with every option spelled out.")


def _provenance(manifest: Manifest) -> str:
    facts = {"source": manifest.source, "bitpress": manifest.bitpress, **manifest.schemes}
    data, check = manifest.data, manifest.check
    if data:
        facts["calibrated on"] = f"{int(data['tokens']):,} tokens of {data['source']}"
    if check:
        facts["checked on"] = (
            f"{check.tokens:,} tokens of {check.text}, in sequences of {check.sequence_length}"
        )
    rows = [(html.escape(key), html.escape(value)) for key, value in facts.items()]
    files = [
        *(_file_row(name, "source", file) for name, file in manifest.inputs.items()),
        *(_file_row(name, "result", file) for name, file in manifest.files.items()),
    ]
    file_table = _table(("file", "of", "#bytes", "SHA-256"), files)
    content = _table(("", ""), rows) + _fold(f"{len(files)} files", file_table)
    return _section("Provenance", content)


def _file_row(name: str, side: str, file: FileRecord) -> Row:
    digest = f"<code>{file.sha256 or '-'}</code>"
    return f"<code>{html.escape(name)}</code>", side, f"{file.bytes:,}", digest


def _section(title: str, content: str, text: str = "") -> str:
    content = f"<figure>{content}</figure>" if content.startswith("<svg") else content
    paragraph = f"<p>{html.escape(text)}</p>\n" if text else ""
    return f"<h2>{html.escape(title)}</h2>\n{paragraph}{content}"


def _fold(title: str, content: str) -> str:
    """HTML that is shown once its title is clicked."""
    return f"<details><summary>{title}</summary>{content}</details>"


def _table(head: Sequence[str], rows: Iterable[Row]) -> str:
    """Columns whose heads begin with # hold numbers; cells are HTML."""
    kinds = [' class="number"' if name.startswith("#") else "" for name in head]
    titles = "".join(
        f"<th{kind}>{html.escape(name.lstrip('#'))}</th>"
        for name, kind in zip(head, kinds, strict=True)
    )
    title_row = f"<tr>{titles}</tr>" if any(head) else ""
    body = ""
    for row in rows:
        cells = [f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)]
        body += f"<tr>{''.join(cells)}</tr>\n"
    return f'<div class="wide"><table>{title_row}\n{body}</table></div>'


def _weight_bytes(manifest: Manifest) -> tuple[int, int]:
    """Bytes of the weight files, the source's and the output's."""
    before = sum(file.bytes for file in manifest.inputs.values())
    after = sum(
        file.bytes for name, file in manifest.files.items() if name.endswith(".safetensors")
    )
    return before, after


def _format_error(error: float | None) -> str:
    return "-" if error is None else f"{error:.3%}"


def _format_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
