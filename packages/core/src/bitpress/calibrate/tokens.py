"""How many tokens come to each expert, and what is said where they are few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bitpress.stacks import OF_EXPERT

# an expert that is sent fewer is compressed as if there were no data: second moments of so few say
# little
FEW = 64
# experts that are named
TOLD = 4


def few(tokens: Mapping[str, int]) -> Iterator[str]:
    """A line for each block's experts of which some are sent few tokens.

    Args:
        tokens: by layer of an expert.
    """
    found: dict[str, dict[str, int]] = {}
    for module, count in tokens.items():
        if place := OF_EXPERT.fullmatch(module):
            found.setdefault(place["experts"], {})[place["number"]] = count
    for experts, counts in found.items():
        short = {number: count for number, count in counts.items() if count < FEW}
        if short:
            names = ", ".join(
                f"{number} ({count} tokens)" for number, count in list(short.items())[:TOLD]
            )
            yield (
                f"{experts}: {len(short)} of {len(counts)} experts were sent fewer than {FEW} "
                "tokens and are compressed as "
                f"without data: {names}{', ...' if len(short) > TOLD else ''}; give more text, or "
                "--all-experts"
            )
