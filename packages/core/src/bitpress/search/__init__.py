"""Which scheme for which layers: the recipe that costs a model's predictions least within a budget of bits per weight."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from attrs import field, frozen

from bitpress import evaluate, recipe
from bitpress.calibrate import memory
from bitpress.calibrate.texts import Choice, load
from bitpress.checkpoint.reader import Reader, open_checkpoint, resolve
from bitpress.compute import cores, device_named, torch_threads
from bitpress.errors import DataError, RecipeError
from bitpress.planning import Plan, make_plan
from bitpress.progress import Progress, quiet
from bitpress.schemes import discover
from bitpress.search.damage import measure
from bitpress.search.knapsack import choose
from bitpress.search.units import Unit, units
from bitpress.served import plain

SAMPLES, JUDGED = (
    64,
    1024,
)  # sequences that candidates are fitted to, unless told otherwise; tokens that predictions are compared on
HUNDREDTH = 0.005  # bits per weight: budgets count to so many, since a few schemes store a number or two for a whole layer


@frozen(eq=False)
class Found:
    """What a search has measured and chosen.

    Attributes:
        names: of the candidates, as they were given.
        plans: of each candidate for every layer.
        damages: by unit and candidate, KL divergence in nats per token where that alone is compressed.
        chosen: by unit, the candidate's place.
    """

    names: tuple[str, ...]
    plans: tuple[Plan, ...] = field(repr=False)
    units: tuple[Unit, ...]
    damages: tuple[tuple[float, ...], ...]
    chosen: tuple[int, ...]

    def bits(self, chosen: Sequence[int]) -> float:
        """Stored bits per weight with a choice for each unit."""
        size = sum(unit.sizes[place] for unit, place in zip(self.units, chosen, strict=True))
        return 8 * size / sum(unit.weights for unit in self.units)

    def damage(self, chosen: Sequence[int]) -> float:
        """What is expected of it: the sum of what each costs alone, in nats per token."""
        return sum(costs[place] for costs, place in zip(self.damages, chosen, strict=True))


def search(
    model: str | Path, *, budget: float, schemes: Sequence[str], settings: Iterable[str] = (), ignore: Iterable[str] = (),
    calibration: str | Path | None = None, samples: int = SAMPLES, sequence_length: int = Choice().length, seed: int = 0,
    device: str = "cpu", threads: int | None = None, max_memory: int | None = None, trust_remote_code: bool = False,
    progress: Progress = quiet,
) -> Found:  # fmt: skip
    """The choice among schemes for each stack of layers with the least expected damage within a budget.

    Args:
        model: a folder, or a Hub name.
        budget: bits per weight of the compressed layers, as stored, scales included.
        schemes: two or more candidates, each a scheme's name or several joined by `+`.
        settings: `[SCHEME.]OPTION=VALUE` texts.
        calibration: as for `compress`: candidates are fitted to the first sequences, and judged on the last few.

    Raises:
        RecipeError: no choice fits the budget; the message says which budgets some do.
        BitpressError: the model, a candidate or the data cannot be used.
    """
    plans = _plans(model, schemes, settings, ignore)
    found = units(plans)
    total = sum(unit.weights for unit in found)
    least, most = (8 * sum(pick(unit.sizes) for unit in found) / total for pick in (min, max))
    if not least <= budget + HUNDREDTH < math.inf:
        raise RecipeError(
            f"--budget {budget:g}: these schemes store from {least:.4g} to {most:.4g} bits per weight of this model"
        )
    source, target = plans[0].source, device_named(device)
    choice = Choice(None if calibration is None else str(calibration), samples, sequence_length, seed)
    ids = load(choice, source.folder, source.config, trust_remote_code).ids
    judged = max(min(JUDGED // ids.shape[1], len(ids) // 2), 1)
    if len(ids) < 2:
        raise DataError(
            f"{calibration or 'the text'}: candidates are fitted to some sequences and judged on others; give two or more"
        )
    changed = judged * ids.shape[1] * len(found) * len(plans)
    place = _spill(plans, found, ids.numel() + changed, max_memory)
    told = progress("measuring", sum(stack.reads for stack in plans[0].stacks))
    with torch_threads(threads or cores()):
        damages = measure(plans[0], found, ids[:-judged], ids[-judged:], target, place, trust_remote_code, told)
    chosen = choose([unit.sizes for unit in found], damages, math.floor((budget + HUNDREDTH) * total / 8))
    assert chosen is not None  # the least is within the budget
    return Found(tuple(schemes), tuple(plans), tuple(found), tuple(map(tuple, damages)), tuple(chosen))


def _plans(model: str | Path, schemes: Sequence[str], settings: Iterable[str], ignore: Iterable[str]) -> list[Plan]:
    if len(set(schemes)) < 2:
        raise RecipeError(f"--schemes {','.join(schemes)}: give two or more to choose from, as in A,B")
    source, registry = open_checkpoint(resolve(model)), discover()
    plans = []
    for name in schemes:
        used = name.split("+")
        own = [text for text in settings if (scheme := text.partition("=")[0].rpartition(".")[0]) in used or not scheme]
        plans.append(make_plan(source, recipe.from_scheme(name, registry, own, ignore)))
    return plans


def _spill(plans: Sequence[Plan], found: Sequence[Unit], tokens: int, limit: int | None) -> Path | None:
    """Where the hidden states of so many tokens are kept: None, in memory, where that is allowed, else a folder.

    Raises:
        RecipeError: the limit, in bytes, is too low for either.
    """
    container, held = plans[0].container, {0: 0}  # by block: all its statistics are held at once, and its weights once more
    for unit in found:
        for stack in (stack for choice in unit.choices for stack in choice):
            rows, width = stack.shape
            own = rows * width + width * width * sum(step.calibrated for step in stack.steps)
            held[unit.block(container)] = held.get(unit.block(container), 0) + own
    solved = max(memory.site(*s.shape, len(s.steps)) for unit in found for choice in unit.choices for s in choice)
    with Reader() as reader:
        least, most = evaluate.need(plain(plans[0].source, reader, container), None, tokens)
    beside = memory.RUNTIME + memory.NUMBER * (max(held.values()) + solved)
    if limit is not None and limit < beside + least:
        needed = (beside + least) / 1e6
        raise RecipeError(f"the search needs about {needed:,.0f} MB of memory, more than the {limit / 1e6:,.0f} MB allowed")
    allowed = memory.RUNTIME + memory.available() // 2 if limit is None else limit
    return Path(tempfile.gettempdir()) if beside + most > allowed else None
