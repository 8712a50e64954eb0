"""Likely wrong types: each does what is meant, or is one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitpress import BitpressError
from bitpress.planning import arguments
from bitpress.schemes.hardware import find_device

ROW = {"text": "a text"}
RULES = {"layers": [{"match": ("*",), "steps": [{"use": "toy", "levels": 7}]}]}


@pytest.mark.parametrize(
    ("read", "value", "meant"),
    [
        (lambda v: arguments.read_path("out", v), "out", Path("out")),
        (lambda v: arguments.read_model("model", v), Path("a/b"), "a/b"),
        (lambda v: arguments.read_texts("ignore", v), "lm_head", ("lm_head",)),
        (lambda v: arguments.read_texts("ignore", v), None, ()),
        (lambda v: arguments.read_texts("copy", v), (p for p in ["a", "b"]), ("a", "b")),
        (arguments.read_settings, "levels=7", ("levels=7",)),
        (arguments.read_settings, {"levels": 7}, ("levels=7",)),
        (
            arguments.read_settings,
            {"toy": {"levels": 7, "exact": True}, "x.algorithm": "rtn"},
            ("toy.levels=7", "toy.exact=true", "x.algorithm=rtn"),
        ),
        (arguments.read_settings, {"block": [128, 128]}, ("block=[128, 128]",)),
        (arguments.read_scheme, ["sparse-2of4", "fp8"], "sparse-2of4+fp8"),
        (arguments.read_recipe, "r.toml", Path("r.toml")),
        (
            arguments.read_recipe,
            RULES,
            {"layers": [{"match": ["*"], "steps": [{"use": "toy", "levels": 7}]}]},
        ),
        (partial(arguments.read_source, "calibration"), Path("texts.jsonl"), "texts.jsonl"),
        (partial(arguments.read_source, "calibration"), None, None),
        (partial(arguments.read_source, "calibration"), ["a", ROW], ("a", ROW)),
        (lambda v: arguments.read_count("samples", v, 256), "64", 64),
        (lambda v: arguments.read_count("samples", v, 256), 64.0, 64),
        (lambda v: arguments.read_count("samples", v, 256), torch.tensor(64), 64),
        (lambda v: arguments.read_count("samples", v, 256), None, 256),
        (arguments.read_threads, "4", 4),
        (arguments.read_threads, None, None),
        (lambda v: arguments.read_number("max_kl", v), "0.01", 0.01),
        (lambda v: arguments.read_size("max_memory", v), "4GB", 4_000_000_000),
        (lambda v: arguments.read_size("max_memory", v), "1.5 gib", 1_500_000_000),
        (lambda v: arguments.read_size("max_memory", v), 4e9, 4_000_000_000),
        (lambda v: arguments.read_size("max_memory", v), "4000", 4000),
        # a float that is below it
        (lambda v: arguments.read_size("max_memory", v), "1.005k", 1005),
        (lambda v: arguments.read_size("max_memory", v), None, None),
        (arguments.read_device, torch.device("cuda:1"), "cuda:1"),
        (arguments.read_device, None, "cpu"),
        (lambda v: arguments.read_hardware("device", v), "H100", find_device("H100")),
    ],
)
def test_what_is_meant(read: Callable[[Any], Any], value: Any, meant: Any) -> None:
    assert read(value) == meant


@pytest.mark.parametrize(
    ("read", "value", "words"),
    [
        (lambda v: arguments.read_path("out", v), 7, ["out: a path", "not 7"]),
        (lambda v: arguments.read_path("out", v), "", ["out: a path", "''"]),
        (
            lambda v: arguments.read_model("model", v),
            SimpleNamespace(save_pretrained=None),
            ["model: a folder or a Hub name", "SimpleNamespace", "save_pretrained"],
        ),
        (lambda v: arguments.read_texts("ignore", v), ["a", 3], ["ignore: ", "not 3"]),
        (lambda v: arguments.read_texts("ignore", v), {"a": 1}, ["ignore: ", "dict"]),
        (arguments.read_scheme, arguments, ["scheme: the name", "module", "recipe="]),
        (arguments.read_scheme, RULES, ["scheme: the name", "dict", "recipe="]),
        (arguments.read_recipe, ["toy"], ["recipe: a TOML file or a table", "list"]),
        (arguments.read_recipe, {"layers": {1}}, ["recipe: it is no table"]),
        (
            partial(arguments.read_source, "calibration"),
            ROW,
            ["calibration: ", "dict", "goes into a list"],
        ),
        (
            partial(arguments.read_source, "calibration"),
            {"a", "b"},
            ["calibration: ", "set has no order"],
        ),
        (partial(arguments.read_source, "calibration"), b"text", ["calibration: ", "bytes"]),
        (partial(arguments.read_source, "calibration"), 64, ["calibration: ", "not 64"]),
        (
            partial(arguments.read_source, "calibration"),
            SimpleNamespace(to_dict=None, columns=None),
            ["calibration: ", 'to_dict("records")'],
        ),
        (lambda v: arguments.read_count("samples", v, 1), "many", ["samples: ", "'many'"]),
        (lambda v: arguments.read_count("samples", v, 1), 1.5, ["samples: ", "1.5"]),
        (lambda v: arguments.read_count("samples", v, 1), True, ["samples: ", "True"]),
        (lambda v: arguments.read_count("samples", v, 1), [1], ["samples: ", "list"]),
        (arguments.read_threads, 0, ["threads: 0"]),
        (lambda v: arguments.read_number("max_kl", v), "low", ["max_kl: ", "'low'"]),
        (lambda v: arguments.read_number("max_kl", v), True, ["max_kl: ", "True"]),
        (lambda v: arguments.read_size("max_memory", v), "4 apples", ["max_memory 4 apples: "]),
        (lambda v: arguments.read_size("max_memory", v), -1, ["max_memory -1: "]),
        (lambda v: arguments.read_size("max_memory", v), [4], ["max_memory list: "]),
        (lambda v: arguments.read_flag("verify", v), "no", ["verify: True or False", "'no'"]),
        (arguments.read_device, 0, ["device: ", "torch.device", "not 0"]),
        (lambda v: arguments.read_hardware("device", v), 9.0, ["device: ", "H100", "9.0"]),
        (lambda v: arguments.read_hardware("device", v), "H10000", ["no known device"]),
    ],
)
def test_what_nobody_can_mean_is_one_line(
    read: Callable[[Any], Any], value: Any, words: list[str]
) -> None:
    with pytest.raises(BitpressError) as error:
        read(value)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
