"""How a calibrated run on a CPU scales with its cores.

    python benchmarks/cores.py MODEL --calibration FILE [--scheme NAME] [--samples N]
        [--sequence-length N] [--threads N,N] [--counted N,N]

Measured: wall and CPU seconds of the command with so many threads, each time anew.

Counted: one run with one thread, in which the CPU seconds of each piece of work that lanes would
share are taken, and those of what only one thread does at a time. From these follows how long as
many cores would take that nothing else uses: pieces are dealt to lanes as a run deals them, leaves
of a sweep take turns, and all else is done by one core. What cores share, such as memory and its
bandwidth, is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from attrs import define, field
from measure import run

import bitpress
from bitpress.numerics import block_sweep
from bitpress.runtime.lanes import Lanes


@define
class Pieces:
    """Seconds that each piece of one shared work took, and those in which they take turns."""

    seconds: list[float] = field(factory=list)
    turns: float = 0.0

    def wall(self, num_lanes: int) -> float:
        """Seconds until the last result is taken, by as many lanes."""
        taken = [0.0] * num_lanes
        for seconds in self.seconds:
            # a piece begins once the result before it in its lane has been taken
            taken.append(max(taken[-1], taken[-num_lanes] + seconds))
        return max(taken[-1], self.turns)


class Clock:
    """Stands in for lanes and for the lock of leaves, and times what they are given."""

    def __init__(self) -> None:
        self.shared: list[Pieces] = []
        self._is_inside = False
        self._entered = 0.0

    def map(self, lanes: Lanes, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """As `Lanes.map` in one thread."""
        pieces = Pieces()
        if not self._is_inside:
            self.shared.append(pieces)
        for item in items:
            if self._is_inside:
                yield work(item)
                continue
            self._is_inside, self._current, start = True, pieces, time.process_time()
            result = work(item)
            pieces.seconds.append(time.process_time() - start)
            self._is_inside = False
            yield result

    def __enter__(self) -> Self:
        self._entered = time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_inside:
            self._current.turns += time.process_time() - self._entered


def count(arguments: argparse.Namespace, out: Path) -> None:
    """Print how long a run would take on other numbers of cores."""
    clock = Clock()
    Lanes.map = lambda lanes, work, items: clock.map(lanes, work, items)  # type: ignore[method-assign]
    block_sweep.COLUMNS_TURN = clock  # type: ignore[assignment]
    start = time.process_time()
    bitpress.compress(
        arguments.model,
        out,
        scheme=arguments.scheme,
        calibration=arguments.calibration,
        samples=arguments.samples,
        sequence_length=arguments.sequence_length,
        threads=1,
        verify=False,
    )
    wall = time.process_time() - start
    alone = wall - sum(sum(pieces.seconds) for pieces in clock.shared)
    print(f"counted, without verification: {wall:.1f} s on one core, {alone:.1f} s of it alone")
    for num_cores in arguments.counted:
        seconds = alone + sum(pieces.wall(num_cores) for pieces in clock.shared)
        print(f"counted, {num_cores} cores: {seconds:.1f} s, {wall / seconds:.2f} times as fast")


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Print what runs cost."""
    words = ["bitpress", "compress", arguments.model]
    options = ["--scheme", arguments.scheme, "--calibration", arguments.calibration]
    options += ["--samples", arguments.samples, "--sequence-length", arguments.sequence_length]
    for threads in arguments.threads:
        out = folder / str(threads)
        cost = run([*words, out, *options, "--no-verify", "--threads", threads])
        print(f"measured, {threads} threads: {cost.wall:.1f} s, {cost.cpu:.1f} CPU s")


def numbers(text: str) -> list[int]:
    """Numbers with commas between them, or none."""
    return [int(number) for number in text.split(",") if number]


def main() -> None:
    """Measure and count runs of one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--counted", type=numbers, default=[1, 2, 4, 16])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))
        count(arguments, Path(folder, "counted"))


if __name__ == "__main__":
    main()
