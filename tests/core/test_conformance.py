"""The conformance kit passes a sound scheme, and each law catches the scheme that breaks it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import TOY, install

WEIGHT = "weight=codes * scale, codes=codes.char()"
ROUND = "(layer.weight / scale).round()"
BEFORE = "@hookimpl\ndef serialize"
PACK = "@hookimpl\ndef pack(layer): return attrs.evolve(layer, weight=layer.weight * 2)\n"
OBSERVE = "@hookimpl\ndef observe(inputs): return {'mean': bitpress.Stat(inputs.float().mean(0), 'sum')}\n"
CHECK = "@hookimpl\ndef check(weight): return 'never even' if (weight != 0).any() else None\n"
JITTER = "(layer.weight / scale + layer.weight.sign() * __import__('torch').rand(1)).trunc()"
ADVICE = "is not a multiple of {options.multiple}; try multiple=1"
BROKEN = {  # what is wrong with the scheme: (its sound source, what stands there instead, a word of the law's name)
    "restores something else": ('["weight"].float()', '["weight"].float() * 1.001', "stored_bytes_decode"),
    "changes the shape": (WEIGHT, "weight=(codes * scale)[:, :1], codes=codes.char()", "keeps_its_shape"),
    "divides by zero": (".clamp(min=1e-30)", "", "scales_are_finite_and_not_zero"),
    "packs another weight": (BEFORE, PACK + BEFORE, "packing_changes_bits_and_not_the_weight"),
    "moves zeros": (ROUND, "(layer.weight / scale + 0.6).ceil()", "zeros_stay_zero"),
    "loses the mask": ("attrs.evolve(layer, weight", "attrs.evolve(layer, keep=None, weight", "masked_positions"),
    "shares a scale": ("amax(1, keepdim=True)", "amax().expand(len(layer.weight), 1)", "do_not_know_their_neighbours"),
    "writes into its input": ("    scale = layer", "    layer.weight.mul_(0.5)\n    scale = layer", "arguments_untouched"),
    "is random": (ROUND, JITTER, "same_input_gives_the_same_bits"),
    "observes a mean": (BEFORE, OBSERVE + BEFORE, "two_half_batches"),
    "refuses without a way out": (ADVICE, "does not fit", "refused_naming_one_that_does"),
    "stores what numbers say": ('{"weight"', '{"more": layer.codes[layer.codes != 0], "weight"', "shapes_and_dtypes_follow"),
    "has a tuple in its config": ('"num_bits": 8', '"num_bits": (8,)', "config_is_json"),
    "is silent about hardware": ('[Finding("supported", "runs anywhere")]', "[]", "every_known_device"),
    "finds fault with itself": (BEFORE, CHECK + BEFORE, "its_own_check"),
    "promises too much": ("* 0.501", "* 0.1", "within_the_bound"),
}


def kit(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the kit as an author does, on a scheme `toy` of that source."""
    install(folder, "bitpress-scheme-toy", module, "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--pyargs",
        "bitpress.conformance",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=folder)


def test_a_sound_scheme_passes_every_law(tmp_path: Path) -> None:
    done = kit(tmp_path, TOY, "--scheme", "toy", "-ra")
    assert done.returncode == 0, done.stdout
    assert "the scheme has no `observe` hook" in done.stdout
    assert "the scheme takes any width" in done.stdout


@pytest.mark.parametrize("fault", BROKEN)
def test_a_law_catches_the_scheme_that_breaks_it(tmp_path: Path, fault: str) -> None:
    sound, broken, law = BROKEN[fault]
    assert sound in TOY
    module = TOY.replace(sound, broken).replace('option(1, "what', 'option(64, "what')
    done = kit(tmp_path, module, "--scheme", "toy", "-k", law)
    assert done.returncode == 1, done.stdout
    assert re.search(rf"FAILED .*{law}", done.stdout)
    assert " error" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"), [((), "needs --scheme NAME"), (("--scheme", "tou"), "no scheme 'tou'; did you mean 'toy'")]
)
def test_the_kit_says_what_it_needs(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = kit(tmp_path, TOY, *arguments)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
