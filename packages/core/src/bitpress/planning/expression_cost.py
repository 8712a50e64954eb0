"""How long a regular expression of a config may take to match a layer's name."""

from __future__ import annotations

import math
import re

from bitpress.checkpoint.engine_facts import MAX_NAME_LENGTH

# Ways in which an expression may try to match a name, at most: a second at the worst.
MAX_WAYS = 10_000_000

# What an expression is made of; other characters stand for themselves.
TOKEN = re.compile(
    r"(?P<reference>\\[1-9]|\(\?P=)"
    r"|(?P<literal>\\.|\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<group>\((?:\?(?::|P<\w+>))?(?!\?))"
    r"|(?P<other>\(\?)"
    r"|(?P<end>\)(?P<repeated>[*+{])?)"
    r"|(?P<alternative>\|)"
    r"|(?P<repetition>(?:[*+]|\{[^}]*\})[?+]?)"
    r"|(?P<optional>\?)",
    re.DOTALL,
)


def may_take_long(pattern: str) -> bool:
    """Whether an expression may try a name of `MAX_NAME_LENGTH` characters in too many ways.

    A repetition may end at each character after the one before it, an alternative double what
    follows. A group that is repeated, a reference and a look ahead are taken for too many.
    """
    repetitions, optionals = 0, 0
    # of the groups that are open, the alternatives so far
    open_groups, ways = [1], 1
    for token in TOKEN.finditer(pattern):
        kind = token.lastgroup
        if kind in ("reference", "other") or token["repeated"]:
            return True
        if kind == "group":
            open_groups.append(1)
        elif kind == "alternative":
            open_groups[-1] += 1
        elif kind == "end":
            ways *= open_groups.pop() if len(open_groups) > 1 else 1
        repetitions += kind == "repetition"
        optionals += kind == "optional"
    # more are too many in any case, and make a large number
    if optionals > MAX_WAYS.bit_length():
        return True
    ends = math.comb(MAX_NAME_LENGTH + repetitions, repetitions)
    return (ends * math.prod(open_groups) * ways) << optionals > MAX_WAYS
