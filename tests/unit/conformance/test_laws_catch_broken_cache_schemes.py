"""The kit passes a sound scheme for a cache, and each law catches the one that breaks it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fixtures.cache_scheme import CACHE, install_cache_scheme
from fixtures.processes import kit

from bitpress.conformance import test_laws_of_caches

LAWS = re.findall(r"^def (test_\w+)", Path(test_laws_of_caches.__file__).read_text(), re.MULTILINE)

RETURN = "return (states / scale)"

# what is wrong: (a text of its source, its replacement), the law that catches it, what must change
BROKEN = {
    "says nothing of itself": (
        ('"""Toy integers for keys and values, for tests."""', ""),
        "says_what_it_is",
        "the plugin needs a docstring",
    ),
    "has an option without help": (
        ('option(127, "whole numbers on either side of 0")', "127"),
        "says_what_it_is",
        "the option 'levels' needs a line of help",
    ),
    "keeps a mean": (
        ("Statistic(states.sum(0)", "Statistic(states.mean(0)"),
        "statistics_of_two_batches",
        "must be a sum or a maximum over tokens",
    ),
    "writes what it has seen into the config": (
        ('"levels": options.levels}', '"levels": stats["key"]["amax"].value.amax().item()}'),
        "what_is_stored_is_what_was_planned",
        "config must not depend on numbers",
    ),
    "stores an infinite scale": (
        (
            'of_states["amax"].value.clamp(min=1e-35) / options.levels',
            "1 / of_states['amax'].value",
        ),
        "what_is_stored_is_finite",
        "is not finite",
    ),
    "divides by zero": (
        (".clamp(min=1e-35)", ""),
        "keys_and_values_come_back_near",
        "makes NaN or infinity of zero key",
    ),
    "loses most of it": (
        (RETURN, "return 0.4 * (states / scale)"),
        "keys_and_values_come_back_near",
        "leaves less than half of",
    ),
    "shrinks": (
        (RETURN, "return 0.9 * (states / scale)"),
        "what_was_rounded_stays",
        "moves rounded key",
    ),
    "takes a scale of its own for some tokens": (
        (RETURN, "scale = states.abs().amax((0, 2), keepdim=True) / 127\n    " + RETURN),
        "a_token_is_rounded_by_itself",
        "must not look at other tokens",
    ),
    "rounds in place": (
        (RETURN, "states.div_(scale).mul_(scale * 1.5)\n    " + RETURN),
        "hooks_leave_what_they_are_given",
        "`quantize_cache` has changed the key it got",
    ),
    "says nothing of devices": (
        ('[Finding("supported", "runs anywhere")]', "[]"),
        "every_device_gets_a_finding",
        "must say something about",
    ),
}


def install(folder: Path, module: str = CACHE) -> Path:
    """The scheme with another source."""
    plugins = install_cache_scheme(folder)
    (file,) = plugins.rglob("bitpress_scheme_cache_int8.py")
    file.write_text(module)
    return plugins


def test_a_sound_scheme_passes(tmp_path: Path) -> None:
    done = kit(install(tmp_path), "--scheme", "cache-int8")
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout


@pytest.mark.parametrize("fault", BROKEN)
def test_a_law_catches_the_scheme_that_breaks_it_and_says_what_must_change(
    tmp_path: Path, fault: str
) -> None:
    (text, replacement), law, words = BROKEN[fault]
    assert text in CACHE
    done = kit(install(tmp_path, CACHE.replace(text, replacement)), "--scheme", "cache-int8")
    assert re.search(rf"FAILED .*{law}", done.stdout), done.stdout
    assert words in done.stdout


def test_every_law_catches_some_scheme() -> None:
    assert not [law for law in LAWS if not any(word in law for _, word, _ in BROKEN.values())]
