"""What every layer of a model costs at one look: the strip of bits, and the heat map of errors."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence

from bitpress.output.manifest import LayerRecord
from bitpress.output.report.layer_grid import LayerGrid
from bitpress.output.report.markup import render_fold, render_name, render_table

# Opacity of the smallest and the largest value's cell: the smallest still shows that a layer is
# there.
MIN_OPACITY, MAX_OPACITY = 0.10, 1.0

# Values that differ by less, as a share of the largest, have one color: colors say what matters.
SMALLEST_RANGE = 0.05

# The height of a strip in units of its own drawing, which stand for bits per weight.
MAX_BITS = 16


def draw_heat_map(grid: LayerGrid, value_of: Callable[[LayerRecord], float | None]) -> str:
    """A row for each kind of layer and a cell for each block, the darker the larger the error.

    The table of the same figures folds out below. Returns nothing where no layer has a value.
    """
    values = grid.summarize(value_of)
    if not values:
        return ""
    smallest, largest = min(values.values()), max(values.values())
    rows = ""
    for kind in grid.kinds:
        row = {block: values[block, kind] for block in grid.blocks if (block, kind) in values}
        if row:
            rows += _draw_row(grid, kind, row, (smallest, largest))
    ends = f"<span>block {grid.blocks[0]}</span><span>block {grid.blocks[-1]}</span>"
    legend = f"<span>{smallest:.2%}</span><i></i><span>{largest:.2%}</span>"
    return (
        f'<figure class="heat"><figcaption>{render_name(grid.container)}'
        f'<span class="scale">{legend}</span></figcaption>\n'
        f'<div class="rows">{rows}<span></span><div class="ends">{ends}</div></div></figure>\n'
        + _render_values(grid, values)
    )


def _draw_row(
    grid: LayerGrid, kind: str, row: Mapping[int, float], limits: tuple[float, float]
) -> str:
    cells = ""
    for position, block in enumerate(grid.blocks):
        if block in row:
            cells += (
                f'<rect x="{position}" width="1" height="1" '
                f'fill-opacity="{_opacity(row[block], *limits):.2f}">'
                f"<title>block {block}: {row[block]:.3%}</title></rect>"
            )
    worst = max(row, key=lambda block: row[block])
    # Where there is little room, lines end at dots.
    name = html.escape(_short_name(kind, grid.kinds)).replace(".", ".<wbr>")
    alternative = (
        f"{kind}: {min(row.values()):.3%} to {row[worst]:.3%}, the largest in block {worst}"
    )
    return (
        f'<code title="{html.escape(kind)}">{name}</code>'
        f'<svg role="img" aria-label="{html.escape(alternative)}" '
        f'viewBox="0 0 {len(grid.blocks)} 1" preserveAspectRatio="none">{cells}</svg>\n'
    )


def _opacity(value: float, smallest: float, largest: float) -> float:
    span = max(largest - smallest, SMALLEST_RANGE * largest)
    share = (value - smallest) / span if span else 0.0
    return MIN_OPACITY + (MAX_OPACITY - MIN_OPACITY) * share


def _short_name(kind: str, kinds: Sequence[str]) -> str:
    """The last parts of a kind's name, as few as no other kind ends with."""
    parts = kind.split(".")
    endings = (".".join(parts[first:]) for first in range(len(parts) - 1, -1, -1))
    others = [f".{other}" for other in kinds if other != kind]
    for ending in endings:
        is_shared = any(other.endswith(f".{ending}") for other in others)
        if not is_shared and not ending.startswith("*"):
            return ending
    return kind


def _render_values(grid: LayerGrid, values: Mapping[tuple[int, str], float]) -> str:
    names = [_short_name(kind, grid.kinds) for kind in grid.kinds]
    rows = []
    for block in grid.blocks:
        cells = [values.get((block, kind)) for kind in grid.kinds]
        rows.append([block, *("-" if cell is None else f"{cell:.2%}" for cell in cells)])
    table = render_table(["block", *(f"#{name}" for name in names)], rows)
    return render_fold(f"The {len(values)} figures as a table", table)


def draw_bits(layers: Mapping[str, LayerRecord]) -> str:
    """A strip of all layers in their order: as wide as they have weights, as high as bits per
    weight, so that areas are bytes.
    """
    num_weights = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    if not num_weights:
        return ""
    rects, start = "", 0.0
    for first, last, weights, bits in _group_by_bits(layers):
        width = 1000 * weights / num_weights
        names = first if first == last else f"{first} to {last}"
        height = min(bits, MAX_BITS)
        rects += (
            f'<rect x="{start:.2f}" y="{MAX_BITS - height:.2f}" width="{width:.2f}" '
            f'height="{height:.2f}"><title>{html.escape(names)}: {bits:.2f} bits per weight</title>'
            "</rect>"
        )
        start += width

    widths = sorted({round(layer.bits, 2) for layer in layers.values()})
    alternative = f"bits per weight of {len(layers)} layers: {widths[0]:.2f}"
    if len(widths) > 1:
        alternative += f" to {widths[-1]:.2f}"
    return (
        f'<figure class="strip"><div class="axis"><span>{MAX_BITS} bits</span><span>0</span></div>'
        f'<svg role="img" aria-label="{alternative}" viewBox="0 0 1000 {MAX_BITS}" '
        f'preserveAspectRatio="none"><title>{alternative}</title>{rects}</svg>'
        '<div class="ends"><span>first layer</span><span>last layer</span></div></figure>'
    )


def _group_by_bits(
    layers: Mapping[str, LayerRecord],
) -> Iterator[tuple[str, str, int, float]]:
    """Neighbors of the same bits: the first and the last name, their weights, and the bits."""
    first, last, weights, bits = "", "", 0, -1.0
    for name, layer in layers.items():
        if round(layer.bits, 2) != bits:
            if weights:
                yield first, last, weights, bits
            first, weights, bits = name, 0, round(layer.bits, 2)
        last = name
        weights += layer.shape[0] * layer.shape[1]
    if weights:
        yield first, last, weights, bits
