"""What a search is to choose, as asked for at the border."""

from __future__ import annotations

from attrs import frozen

from bitpress.schemes.values import NORMAL_EFFORT


@frozen
class SearchGoal:
    """What to choose from, and how much the choice may take.

    Attributes:
        schemes: NAME, or NAME:OPTION=VALUE:OPTION=VALUE, several steps joined by `+`; "none" leaves
            layers as they are.
        budget: stored bits per weight of the layers, scales included, to two decimals.
        settings: `[SCHEME.]OPTION=VALUE` texts, which override the options of schemes.
        ignore: patterns of layers to leave alone.
        effort: the level of options that are not set.
    """

    schemes: tuple[str, ...]
    budget: float
    settings: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    effort: str = NORMAL_EFFORT
