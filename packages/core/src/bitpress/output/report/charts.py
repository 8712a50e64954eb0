"""Charts of HTML and SVG, whose colors are the page's variables, so that one drawing serves light
and dark. SVG holds shapes alone and takes any width; words are HTML beside it, and keep their size.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

# Units of a drawing's height and width, which the page stretches to the size of its box.
CHART_SIZE = 100

# By series: (block, value).
Points = Mapping[str, Sequence[tuple[int, float]]]


def draw_lines(points: Points, label: str) -> str:
    """A line over the number of the block for each series, from zero on.

    Args:
        points: of at most two series, for which the page has colors.
        label: of the values, which are relative errors.
    """
    blocks = [block for series in points.values() for block, _ in series]
    first, last = min(blocks), max(blocks)
    largest = max(value for series in points.values() for _, value in series) or 1.0
    lines, legend = "", ""
    for number, (name, series) in enumerate(points.items()):
        color = f"var(--series-{number})"
        coordinates = " ".join(
            f"{_scale(block - first, last - first):.2f},{CHART_SIZE - _scale(value, largest):.2f}"
            for block, value in sorted(series)
        )
        lines += f'<polyline points="{coordinates}" stroke="{color}"/>'
        legend += f'<span><i style="background: {color}"></i>{html.escape(name)}</span>'
    alternative = html.escape(f"{label} after blocks {first} to {last}, at most {largest:.3%}")
    return (
        f'<figure class="lines"><figcaption>{legend}</figcaption>'
        f'<div class="axis"><span>{largest:.2%}</span><span>0</span></div>'
        f'<svg role="img" aria-label="{alternative}" viewBox="0 0 {CHART_SIZE} {CHART_SIZE}" '
        f'preserveAspectRatio="none"><title>{alternative}</title>'
        f'<path d="M0 0H{CHART_SIZE}M0 {CHART_SIZE}H{CHART_SIZE}"/>{lines}</svg>'
        f'<div class="ends"><span>block {first}</span><span>block {last}</span></div></figure>'
    )


def draw_bars(values: Mapping[str, float], unit: str) -> str:
    """Horizontal bars, each with its name and value."""
    largest = max(values.values()) or 1.0
    bars = "".join(
        f"<dt>{html.escape(name)}</dt>"
        f'<dd><i style="width: {_scale(value, largest):.1f}%"></i>{value:,.2f} {unit}</dd>'
        for name, value in values.items()
    )
    return f'<dl class="bars">{bars}</dl>'


def _scale(value: float, largest: float) -> float:
    return CHART_SIZE * value / largest if largest else 0.0
