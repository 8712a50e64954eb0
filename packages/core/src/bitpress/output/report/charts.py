"""Charts as SVG whose colors are the page's variables, so that one drawing serves light and
dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.errors import BitpressError

# Colors that the page has for series.
NUM_COLORS = 8

# Stand for the page's variables while matplotlib draws, as the series' colors do.
INK, LINE = "#010203", "#010204"

# How many times the smallest value the largest must be for a logarithmic axis.
LOG_RATIO = 20

# By series: (block, value).
Points = Mapping[str, Sequence[tuple[int, float]]]


def draw_by_block(points: Points, label: str) -> str:
    """Dots over the number of the block, a line through each series' means; logarithmic where
    values differ a lot.

    Args:
        label: of the values' axis.
    """
    plot = _matplotlib()
    figure, axes = plot.subplots(figsize=(9, 3.6), layout="constrained")
    for number, (name, series) in enumerate(points.items()):
        color = _color(number % NUM_COLORS)
        blocks = sorted({block for block, _ in series})
        means = [_mean([value for block, value in series if block == at]) for at in blocks]
        axes.plot(blocks, means, color=color, linewidth=1.6, label=name)
        axes.plot(*zip(*series, strict=True), "o", color=color, markersize=3.6, alpha=0.9)

    values = [value for series in points.values() for _, value in series if value > 0]
    if values and max(values) > LOG_RATIO * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.minorticks_off()
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="decoder block", ylabel=label)
    if len(points) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelcolor=INK)
    return _svg(figure, axes, label)


def draw_bars(values: Mapping[str, float], unit: str) -> str:
    """Horizontal bars, each with its value."""
    plot = _matplotlib()
    figure, axes = plot.subplots(figsize=(9, 0.45 + 0.4 * len(values)), layout="constrained")
    bars = axes.barh(list(values), list(values.values()), color=_color(0), height=0.62)
    axes.bar_label(
        bars, fmt=lambda value: f"{value:,.2f} {unit}", padding=6, color=INK, fontsize=10
    )
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.xaxis.set_visible(False)
    return _svg(figure, axes, "sizes")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _color(number: int) -> str:
    return f"#0101{16 + number:02x}"


def _svg(figure: Any, axes: Any, title: str) -> str:
    axes.grid(axis="y" if axes.xaxis.get_visible() else "x", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" and axes.xaxis.get_visible())
        spine.set_color(LINE)
    output = io.StringIO()
    figure.savefig(
        output,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Title": title},
    )
    _matplotlib().close(figure)
    drawing = output.getvalue()
    # what precedes it is no part of a page
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", drawing)
    drawing = drawing.replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    return re.sub(
        r"#0101(1[0-9a-f])", lambda match: f"var(--series-{int(match[1], 16) - 16})", drawing
    )


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise BitpressError(
            "a report needs matplotlib: pip install 'bitpress-core[report]'"
        ) from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    # the same page every time, its words searchable and in its own typeface
    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "bitpress",
            "font.size": 10.5,
            "text.parse_math": False,
        }
    )
    return pyplot
