"""The conformance kit passes a sound scheme, and each law catches the scheme that breaks it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures.processes import kit
from fixtures.toy_scheme import TOY

from bitpress import conformance
from bitpress.conformance.commands import install

WEIGHT = "weight=codes * scale, codes=codes.char()"
ROUND = "(layer.weight / scale).round()"
SERIALIZE = "@hookimpl\ndef serialize"
EVOLVE = "return attrs.evolve(layer, weight"
QPARAMS = 'qparams={"scale": scale}'
FORMAT = '"format": "int-quantized"'
ADVICE = "is not a multiple of {options.multiple}; try multiple=1"
FINDING = 'Finding("supported", "runs anywhere")'


def hook(text: str) -> tuple[str, str]:
    """The replacement that adds a hook to the toy."""
    return SERIALIZE, f"@hookimpl\n{text}\n\n{SERIALIZE}"


def observing(stat: str) -> tuple[str, str]:
    """The replacement that makes the toy observe something."""
    return hook(
        f"def observe(inputs): return None if inputs is None else {{'seen': bitpress.Statistic("
        f"{stat})}}"
    )


def rounding(text: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """The replacements that make the toy round its inputs, as its config says."""
    config = (
        FORMAT,
        FORMAT + ', "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True}',
    )
    return config, hook(f"def quantize_activations(inputs):\n    {text}")


# what is wrong: (texts of its source and their replacements), the law that catches it, what must
# change
BROKEN = {
    "says nothing of itself": (
        [('"""Toy integers, for tests."""', "")],
        "says_what_it_is",
        "the plugin needs a docstring",
    ),
    "has an option without help": (
        [('option(127, "the largest code")', "127")],
        "says_what_it_is",
        "the option 'levels' needs a line of help",
    ),
    "says not how small it gets": (
        [("def bits(self): return 8", "def bits(self): return None")],
        "says_what_it_is",
        "`Options.bits` must say",
    ),
    "writes another format with little effort": (
        [
            (SERIALIZE, 'EFFORTS = {"low": {"levels": 7}}\n\n' + SERIALIZE),
            ('"num_bits": 8', '"num_bits": 8 if options.levels > 7 else 4'),
        ],
        "a_level_of_effort",
        "EFFORTS['low'] changes what is stored",
    ),
    "has a level that an option does not go with": (
        [
            (SERIALIZE, 'EFFORTS = {"high": {"levels": 7}}\n\n' + SERIALIZE),
            (
                "    @property\n",
                "    wide: bool = option(False, 'wide')\n"
                "    def __attrs_post_init__(self):\n"
                "        if self.wide and self.levels == 7: raise ValueError('7 is narrow')\n"
                "    @property\n",
            ),
        ],
        "a_level_of_effort",
        "EFFORTS['high'] must go with every option that a user may set",
    ),
    "restores something else": (
        [('["weight"].float()', '["weight"].float() * 1.001')],
        "stored_bytes_decode",
        "the weight that `quantize` returned",
    ),
    "restores half precision": (
        [('["weight"].float() * tensors["weight_scale"]', '["weight"].half()')],
        "stored_bytes_decode",
        "must return float32",
    ),
    "changes the shape": (
        [(WEIGHT, "weight=(codes * scale)[:, :1], codes=codes.char()")],
        "keeps_its_shape",
        "quantize made a weight of",
    ),
    "computes in half precision": (
        [(WEIGHT, "weight=(codes * scale).half(), codes=codes.char()")],
        "keeps_its_shape",
        "quantize made a weight of",
    ),
    "overflows": (
        [(ROUND, "(layer.weight * options.levels**4 / (scale * options.levels**4)).round()")],
        "effective_weight_is_finite",
        "made NaN or infinity of the finite weight 'huge'",
    ),
    "divides by zero": (
        [(".clamp(min=1e-30)", "")],
        "scales_are_finite_and_not_zero",
        "must be finite and positive",
    ),
    "packs another weight": (
        [hook("def pack(layer): return attrs.evolve(layer, weight=layer.weight * 2)")],
        "packing_changes_bits_and_not_the_weight",
        "`pack` must leave `weight` as it is",
    ),
    "moves zeros": (
        [(ROUND, "(layer.weight / scale + 0.6).ceil()")],
        "zeros_stay_zero",
        "`quantize` must leave zeros zero",
    ),
    "loses the mask": (
        [(EVOLVE, "return attrs.evolve(layer, mask=None, weight")],
        "masked_positions",
        "must hand `mask` on",
    ),
    "fills what is masked": (
        [(ROUND, ROUND + " + (layer.mask is not None)")],
        "masked_positions",
        "zero where `layer.mask` is False",
    ),
    "opens the mask": (
        [
            (
                EVOLVE,
                "return attrs.evolve(layer, mask=None if layer.mask is None else layer.mask | "
                "True, weight",
            )
        ],
        "masked_positions",
        "must not allow again",
    ),
    "shares a scale": (
        [("amax(1, keepdim=True)", "amax().expand(len(layer.weight), 1)")],
        "do_not_know_their_neighbors",
        "declare how many rows share numbers in `Options.row_block` (now 1)",
    ),
    "has qparams that lie across": (
        [
            (QPARAMS, 'qparams={"scale": scale.T}'),
            ('layer.qparams["scale"]', 'layer.qparams["scale"].T'),
        ],
        "members_of_a_stack",
        "the leading axis of `codes` and `qparams` must follow the rows",
    ),
    "writes into its weight": (
        [("    scale = layer", "    layer.weight.mul_(0.5)\n    scale = layer")],
        "arguments_untouched",
        "changed the weight it",
    ),
    "writes into inputs": (
        [observing("inputs.abs_().amax(0).float(), 'max'")],
        "arguments_untouched",
        "`observe` changed its inputs",
    ),
    "is random": (
        [
            (
                ROUND,
                "(layer.weight / scale + layer.weight.sign() * "
                "__import__('torch').rand(1)).trunc()",
            )
        ],
        "same_input_gives_the_same_bits",
        "differs between two runs on one input",
    ),
    "observes a mean": (
        [observing("inputs.float().mean(0), 'sum'")],
        "two_half_batches",
        "the statistic 'seen' must be a raw sum or maximum",
    ),
    "keeps every token": (
        [observing("inputs.float(), 'sum'")],
        "two_half_batches",
        "the statistic 'seen' must be a raw sum or maximum",
    ),
    "adds up in half precision": (
        [observing("inputs.amax(0), 'max'")],
        "two_half_batches",
        "the statistic 'seen' must be float32",
    ),
    "gives up without data": (
        [
            observing("inputs.float().amax(0), 'max'"),
            ("def quantize(layer, options):", "def quantize(layer, stats, options):"),
            (ROUND, ROUND + " * ('seen' in stats)"),
        ],
        "never_saw_a_token",
        "must round to nearest where `stats` holds nothing of inputs",
    ),
    "has factors for rows": (
        [hook("def rescale(layer): return layer.weight[:, 0].abs() + 1")],
        "factors_for_columns",
        "one factor for each column",
    ),
    "has factors of zero": (
        [hook("def rescale(layer): return layer.weight.abs().amax(0)")],
        "factors_for_columns",
        "finite positive factors",
    ),
    "refuses without a way out": (
        [(ADVICE, "does not fit")],
        "refused_naming_one_that_does",
        "must name a width that fits",
    ),
    "stores what numbers say": (
        [('{"weight"', '{"more": layer.codes[layer.codes != 0], "weight"')],
        "shapes_and_dtypes",
        "must follow from shapes",
    ),
    "configures what numbers say": (
        [(FORMAT, FORMAT + ', "most": int(layer.codes.max())')],
        "shapes_and_dtypes_follow",
        "must not depend on numbers",
    ),
    "has a tuple in its config": (
        [('"num_bits": 8', '"num_bits": (8,)')],
        "config_is_json",
        "JSON values only",
    ),
    "names no format": ([(FORMAT, '"moon": 1')], "config_is_json", "must name its `format`"),
    "is silent about hardware": (
        [(f"[{FINDING}]", "[]")],
        "every_known_device",
        "must say something of NVIDIA",
    ),
    "invents a level": (
        [('"supported"', '"splendid"')],
        "every_known_device",
        "the level 'splendid' is not one of",
    ),
    "refuses every shape": (
        [hook("def validate_shape(): return [Finding('unsupported', 'never')]")],
        "divide_by_everything",
        "refuses 4096 x 4096",
    ),
    "claims to keep codes": (
        [hook("def keep_codes(form, options): return options")],
        "codes_of_a_source_that_are_kept",
        "must keep the weight of 4-bit integers in groups of 16",
    ),
    "finds fault with itself": (
        [hook("def validate_weight(weight): return 'never even' if (weight != 0).any() else None")],
        "its_own_check",
        "never even",
    ),
    "promises too much": (
        [("* 0.501", "* 0.1")],
        "within_the_bound",
        "`error_bound` is smaller than",
    ),
    "moves weights as far as zeros are": (
        [(ROUND, ROUND + ".flip(1)"), ("* 0.501", "* 1e9")],
        "a_damage_to_what_is_stored",
        "a run would take that for damage",
    ),
    "stores what nothing reads": (
        [('tensors = {"weight": ', 'tensors = {"spare": layer.codes.float(), "weight": ')],
        "destroyed_codes",
        "where spare is zero, nothing finds it",
    ),
    "forgets what inputs become": (
        rounding("pass")[:1],
        "says_of_activations",
        "no `quantize_activations` hook: the config names `input_activations`",
    ),
    "mixes tokens": (
        rounding("return (inputs / inputs.abs().amax() * 127).round() * inputs.abs().amax() / 127"),
        "says_of_activations",
        "must not mix tokens",
    ),
    "divides by a token of zeros": (
        rounding(
            "most = inputs.abs().amax(1, keepdim=True); return (inputs / most * 127).round() * "
            "most / 127"
        ),
        "says_of_activations",
        "made NaN or infinity of finite inputs",
    ),
    "rounds inputs to something else": (
        rounding("return -inputs"),
        "says_of_activations",
        "numbers near to the inputs",
    ),
}
# The law of loaders needs compressed-tensors: tests/integration/test_loaders.py breaks it.
LAWS = {
    name
    for file in Path(conformance.__file__).parent.glob("test_*.py")
    if file.stem not in ("test_laws_of_loaders", "test_laws_of_caches")
    for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
}


def toy(folder: Path, module: str) -> Path:
    """A folder of plugins with a scheme `toy` of that source."""
    return install(
        folder,
        "bitpress-scheme-toy",
        module,
        "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n",
    )


def test_a_sound_scheme_passes_every_law_and_what_it_lacks_is_skipped_with_the_reason(
    tmp_path: Path,
) -> None:
    words = [
        sys.executable,
        "-m",
        "pytest",
        "--pyargs",
        "bitpress.conformance",
        "-ra",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
    ]
    environment = {**os.environ, "PYTHONPATH": str(toy(tmp_path, TOY))}
    done = subprocess.run(
        [*words, "--scheme", "toy"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    for lack in (
        "the scheme has no `observe` hook",
        "the scheme has no `rescale` hook",
        "the scheme takes any width",
        "these options need no data",
        "activations stay as they are",
    ):
        assert lack in done.stdout


@pytest.mark.parametrize("fault", BROKEN)
def test_a_law_catches_the_scheme_that_breaks_it_and_says_what_must_change(
    tmp_path: Path, fault: str
) -> None:
    replacements, law, words = BROKEN[fault]
    module = TOY.replace('option(1, "what', 'option(64, "what')
    for text, replacement in replacements:
        assert text in module
        module = module.replace(text, replacement)
    done = kit(toy(tmp_path, module), "--scheme", "toy", "-k", law)
    assert done.returncode == 1, done.stdout
    assert re.search(rf"FAILED .*{law}", done.stdout)
    assert words in done.stdout
    assert " error" not in done.stdout


def test_every_law_catches_some_scheme() -> None:
    assert len(BROKEN) >= 20
    assert not [law for law in LAWS if not any(word in law for _, word, _ in BROKEN.values())]


def test_several_schemes_are_tried_in_one_run(tmp_path: Path) -> None:
    folder = toy(tmp_path, TOY)
    twin = "[bitpress.schemes]\ntwin = bitpress_scheme_twin\n"
    install(folder, "bitpress-scheme-twin", TOY, twin)
    words = ["--scheme", "toy", "--scheme", "twin", "-vv", "-k", "zeros_stay_zero"]
    done = kit(folder, *words)
    assert done.returncode == 0, done.stdout
    assert "[toy, defaults] PASSED" in done.stdout
    assert "[twin, defaults] PASSED" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs --scheme NAME"),
        (("--scheme", "tou"), "scheme 'tou' is not installed; did you mean 'toy'"),
    ],
)
def test_the_kit_says_what_it_needs(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = kit(toy(tmp_path, TOY), *arguments)
    assert done.returncode != 0
    assert words in done.stdout + done.stderr
