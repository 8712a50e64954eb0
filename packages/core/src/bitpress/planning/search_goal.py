"""What a search is to choose, as asked for at the border."""

from __future__ import annotations

from attrs import frozen

from bitpress.schemes.values import NORMAL_EFFORT


@frozen
class Budget:
    """How much a choice may take: bits of the layers, or bytes of the whole model.

    Attributes:
        text: as the user wrote it.
        bits: stored bits per weight of the decoder blocks' layers, scales included, to two
            decimals; None where the budget is in bytes.
        num_bytes: of all weights, those of the head and the embeddings included, and of the cache.
    """

    text: str
    bits: float | None = None
    num_bytes: int | None = None


@frozen
class SearchGoal:
    """What to choose from, and how much the choice may take.

    Attributes:
        schemes: NAME, or NAME:OPTION=VALUE:OPTION=VALUE, several steps joined by `+`; "none" leaves
            layers as they are. One may be a scheme for the cache.
        budget: which choices are allowed.
        cache_tokens: whose keys and values a budget in bytes has room for, beside the weights.
        settings: `[SCHEME.]OPTION=VALUE` texts, which override the options of schemes.
        ignore: patterns of layers to leave alone.
        effort: the level of options that are not set.
    """

    schemes: tuple[str, ...]
    budget: Budget
    cache_tokens: int = 0
    settings: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    effort: str = NORMAL_EFFORT
