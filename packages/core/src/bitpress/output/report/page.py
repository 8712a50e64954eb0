"""The page: tiles, charts and tables, each made of the manifest's figures."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from bitpress.checkpoint import filenames
from bitpress.checkpoint.layer_names import NUMBER
from bitpress.errors import BitpressError, CheckpointError
from bitpress.output.manifest import FileRecord, LayerRecord, Manifest
from bitpress.output.report import charts, heat_map
from bitpress.output.report.layer_grid import arrange_layers
from bitpress.output.report.markup import (
    Row,
    format_error,
    render_fold,
    render_name,
    render_section,
    render_table,
)
from bitpress.planning.recipe_tables import parse_cache, parse_rules
from bitpress.runtime.memory import format_bytes
from bitpress.schemes import hardware
from bitpress.schemes.registry import Registry, discover
from bitpress.schemes.values import Finding

# The number of a block at the end of its name.
BLOCK_NUMBER = re.compile(rf"\.({NUMBER.pattern})$")

DOCTYPE = "<!doctype html>"


def is_page(file: Path) -> bool:
    """Whether a file is there and holds a page."""
    if not file.is_file():
        return False
    with file.open("rb") as f:
        return f.read(len(DOCTYPE)) == DOCTYPE.encode()


# Layers in the table of the worst; all are in one that folds out.
NUM_WORST = 12


def render_page(manifest: Manifest, name: str) -> str:
    """The HTML of an output of that name.

    Raises:
        CheckpointError: the manifest is damaged, and names no weight files.
    """
    if not all(_weight_bytes(manifest)):
        raise CheckpointError(
            f"{name}: its {filenames.MANIFEST} names no weight files of the source or the result"
        )
    sections = [
        render(manifest)
        for render in (
            _tiles,
            _bits,
            _errors,
            _drift,
            _measured_damage,
            _sizes,
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
    tiles, check = [], manifest.check
    if check and check.kl is not None and check.top1 is not None:
        tiles += [
            (f"{check.kl:.4f}", f"KL divergence, nats per token of {check.tokens:,}"),
            (f"{check.top1:.1%}", "top-1 agreement with the source"),
            (f"{check.perplexity:.3f}", f"perplexity; the source's {check.source_perplexity:.3f}"),
        ]

    before, after = _weight_bytes(manifest)
    tiles += [
        (f"{before / after:.2f}x", f"smaller: {format_bytes(before)} to {format_bytes(after)}"),
        (f"{manifest.bits:.2f}", f"bits per weight in {len(manifest.layers)} layers"),
    ]
    if manifest.caches:
        tiles.append((f"{len(manifest.caches)}", "attentions with scales for their caches"))
    errors = [layer.error for layer in manifest.layers.values() if layer.error is not None]
    if errors:
        tiles.append((f"{max(errors):.2%}", "largest error of a weight, verified"))
    else:
        tiles.append(("not verified", "written with --no-verify"))
    cells = "".join(
        f'<div class="tile"><b>{html.escape(figure)}</b><span>{html.escape(text)}</span></div>'
        for figure, text in tiles
    )
    content = f'<div class="tiles">{cells}</div>'
    if check is None or check.kl is None:
        content += (
            "\n<p>What the model has lost was not measured: <code>bitpress eval OUT --against "
            "MODEL</code> does, and so does <code>compress --check</code>.</p>"
        )
    return content


def _sizes(manifest: Manifest) -> str:
    before, after = (num_bytes / 1e6 for num_bytes in _weight_bytes(manifest))
    chart = charts.draw_bars({"source": before, "result": after}, "MB")
    return render_section("Size", chart, "Weight files on disk.")


def _bits(manifest: Manifest) -> str:
    counts: dict[tuple[str, str], int] = {}
    for layer in manifest.layers.values():
        group = " + ".join(layer.steps), f"{layer.bits:.2f}"
        counts[group] = counts.get(group, 0) + 1
    rows = [(html.escape(steps), bits, f"{num:,}") for (steps, bits), num in counts.items()]
    content = heat_map.draw_bits(manifest.layers)
    if content and len(rows) > 1:
        table = render_table(("steps", "#bits per weight", "#layers"), rows)
        content += render_fold(f"The {len(rows)} formats as a table", table)
    return render_section(
        "Bits of each layer",
        content,
        "In the order of the model: as wide as a layer has weights, as high as bits per weight, "
        "scales included. An area stands for bytes.",
    )


def _errors(manifest: Manifest) -> str:
    weights = _heat_maps(
        manifest,
        "Error of each layer's weight",
        lambda layer: layer.error,
        "|restored − source| / |source|, measured on the written files; of experts the largest.",
    )
    outputs = _heat_maps(
        manifest,
        "Error of each layer's output",
        lambda layer: layer.output_error,
        "|W x − Q x| / |W x| on calibration inputs: what the error of the weight does to what the "
        "layer gives; of experts the largest.",
    )
    return "\n".join(filter(None, (outputs, weights)))


def _heat_maps(
    manifest: Manifest, title: str, value_of: Callable[[LayerRecord], float | None], text: str
) -> str:
    """A heat map for each list of blocks; nothing where no layer has the value."""
    maps = [heat_map.draw_heat_map(grid, value_of) for grid in arrange_layers(manifest.layers)]
    return render_section(title, "\n".join(filter(None, maps)), text)


def _drift(manifest: Manifest) -> str:
    points: dict[str, list[tuple[int, float]]] = {}
    if manifest.check and manifest.check.drift:
        points["the check's text"] = list(enumerate(manifest.check.drift))
    if manifest.blocks:
        matches = [(BLOCK_NUMBER.search(name), drift) for name, drift in manifest.blocks.items()]
        points["calibration data"] = [(int(match[1]), drift) for match, drift in matches if match]
    points = {name: series for name, series in points.items() if series}
    if not points:
        return ""
    name, series = next(iter(points.items()))
    return render_section(
        "How far hidden states drift",
        charts.draw_lines(points, "relative distance")
        + render_fold(f"What each block adds, on {name}", _added_drift(series)),
        "|h − h′| / |h′| of the hidden states after each block, h′ being the source's: how errors "
        "add up on the way.",
    )


def _added_drift(series: Sequence[tuple[int, float]]) -> str:
    """A table of the distance after each block, and of what the block adds to it."""
    rows, before = [], 0.0
    for block, drift in sorted(series):
        rows.append((block, f"{drift:.3%}", f"{drift - before:+.3%}"))
        before = drift
    return render_table(("block", "#distance after it", "#added"), rows)


def _measured_damage(manifest: Manifest) -> str:
    has_output_errors = any(layer.output_error is not None for layer in manifest.layers.values())

    def error(layer: LayerRecord) -> float:
        value = layer.output_error if has_output_errors else layer.error
        return value or 0.0

    by_error = sorted(manifest.layers.items(), key=lambda item: -error(item[1]))
    rows = [
        (
            render_name(name),
            *([format_error(layer.output_error)] if has_output_errors else []),
            format_error(layer.error),
            f"{layer.bits:.2f}",
            html.escape(" + ".join(layer.steps)),
        )
        for name, layer in by_error
    ]
    head = ["layer", "#error", "#bits per weight", "steps"]
    if has_output_errors:
        head.insert(1, "#output error")
    content = render_table(head, rows[:NUM_WORST])
    if len(rows) > NUM_WORST:
        content += render_fold(f"All {len(rows)} layers", render_table(head, rows))
    order = "error of its output on calibration inputs" if has_output_errors else "weight's error"
    text = (
        f"Measured layer by layer, by the {order}. What a layer costs the model's predictions is "
    )
    text += "another figure: bitpress search measures it, and chooses the steps by it."
    return render_section("Layers with the largest errors", content, text)


def _hardware(manifest: Manifest) -> str:
    registry = discover()
    # devices by what a scheme finds of them
    devices: dict[tuple[str, Finding], list[str]] = {}
    rules = parse_rules(manifest.recipe, filenames.MANIFEST)
    steps = [step for rule in rules for step in rule.steps]
    if cache := parse_cache(manifest.recipe, filenames.MANIFEST):
        steps.append(cache)
    for scheme, options in steps:
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
    return render_section("Where it serves", render_table(head, rows))


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
        content += render_fold(title, f"<ul>{warnings}</ul>")
    return render_section("Settings", content, "The recipe, with every option spelled out.")


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
    file_table = render_table(("file", "of", "#bytes", "SHA-256"), files)
    content = render_table(("", ""), rows) + render_fold(f"{len(files)} files", file_table)
    return render_section("Provenance", content)


def _file_row(name: str, side: str, file: FileRecord) -> Row:
    return render_name(name), side, f"{file.bytes:,}", render_name(file.sha256 or "-")


def _weight_bytes(manifest: Manifest) -> tuple[int, int]:
    """Bytes of the weight files, the source's and the output's."""
    before = sum(file.bytes for file in manifest.inputs.values())
    after = sum(
        file.bytes for name, file in manifest.files.items() if name.endswith(".safetensors")
    )
    return before, after
