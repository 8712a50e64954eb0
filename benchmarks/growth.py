"""What work costs as it grows: data-free FP8 from 0.25 to 4 GB, calibrated W4A16 from 2 to 16
blocks; table and plot.

    python benchmarks/growth.py [--work DIR] [--plot docs/growth.svg] [--json FILE]

Made-up Llamas in shards of about 0.5 GB, one thread, without verification, from a warm page cache;
each model is deleted once it is measured. A straight line through the first and the last figure
says what the ones between should be.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import models
from attrs import asdict, frozen
from measure import Cost, run

ROOT = Path(__file__).parents[1]
TEXTS = ROOT / "../shared/calib/calib.jsonl"
CALIBRATED = ("--scheme", "w4a16", "--calibration", TEXTS, "--samples", 8, "--sequence-length", 512)


@frozen
class Series:
    """Models that differ in their number of blocks, and what is done with them."""

    title: str
    unit: str
    blocks: Sequence[int]
    hidden: int
    intermediate: int
    arguments: Sequence[object]


SERIES = (
    Series("fp8, without data", "GB", (2, 4, 8, 16, 33), 2048, 8192, ("--scheme", "fp8")),
    Series("w4a16, 4,096 tokens", "blocks", (2, 4, 8, 16), 512, 1408, CALIBRATED),
)


@frozen
class Point:
    """One run: how large its model is, in the series' unit, and what it cost."""

    size: float
    cost: Cost


def points(series: Series, folder: Path) -> list[Point]:
    """Time and memory of a run for every size of a series."""
    result = []
    for blocks in series.blocks:
        source, out = folder / "growing", folder / "grown"
        shutil.rmtree(source, ignore_errors=True)
        models.make(source, blocks, series.hidden, series.intermediate, shards=max(blocks // 4, 1))
        shutil.rmtree(out, ignore_errors=True)
        files = list(source.glob("*.safetensors"))
        for file in files:
            with file.open("rb") as opened:
                # into the page cache
                while opened.read(1 << 24):
                    pass
        size = sum(file.stat().st_size for file in files) / 1e9 if series.unit == "GB" else blocks
        command = [
            sys.executable,
            "-m",
            "bitpress",
            "compress",
            source,
            out,
            *series.arguments,
            "--threads",
            1,
            "--no-verify",
        ]
        result.append(Point(size, run(command)))
        shutil.rmtree(source)
        shutil.rmtree(out)
    return result


def straight(series_points: Sequence[Point], size: float) -> float:
    """CPU seconds at a size, on the line through the first and the last point."""
    first, last = series_points[0], series_points[-1]
    return first.cost.cpu + (last.cost.cpu - first.cost.cpu) * (size - first.size) / (
        last.size - first.size
    )


def plot(file: Path, everything: Sequence[tuple[Series, Sequence[Point]]]) -> None:
    """Draw time and memory over the size of the model."""
    import matplotlib

    matplotlib.use("svg")
    # the same figures give the same file
    matplotlib.rcParams["svg.hashsalt"] = "bitpress"
    from matplotlib import pyplot

    figure, places = pyplot.subplots(
        2, len(everything), figsize=(8, 5), sharex="col", squeeze=False
    )
    for (series, result), above, below in zip(everything, *places, strict=True):
        sizes = [point.size for point in result]
        above.plot(sizes, [straight(result, size) for size in sizes], color="0.8")
        above.plot(sizes, [point.cost.cpu for point in result], "o", color="C0")
        below.plot(sizes, [point.cost.memory for point in result], "o-", color="C1")
        above.set(title=series.title, ylabel="CPU seconds", ylim=(0, None))
        most = max(point.cost.memory for point in result)
        below.set(
            xlabel=series.unit, ylabel="peak memory, MB", ylim=(0, 1.25 * most), xlim=(0, None)
        )
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Measure all series, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("bench-output"), help="where models and outputs go"
    )
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/growth.svg")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    everything = []
    print("| | size | CPU s | on a straight line | wall s | peak MB |\n|---|---|---|---|---|---|")
    for series in SERIES:
        everything.append((series, points(series, arguments.work)))
        for point in everything[-1][1]:
            line, cost = straight(everything[-1][1], point.size), point.cost
            size = f"{point.size:.2f}" if series.unit == "GB" else f"{point.size}"
            row = (
                f"{series.title} | {size} {series.unit} | {cost.cpu:.1f} | {line:.1f} | "
                f"{cost.wall:.1f} | {cost.memory:.0f}"
            )
            print(f"| {row} |", flush=True)
    plot(arguments.plot, everything)
    if arguments.json:
        result = {
            series.title: [{"size": p.size, **asdict(p.cost)} for p in series_points]
            for series, series_points in everything
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
