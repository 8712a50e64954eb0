"""A level of effort gives schemes the options that they name for it; what a user sets wins over
them, and a plan says what each level costs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from fixtures.learner_scheme import LEARNER, runnable_model
from fixtures.toy_scheme import TOY

import bitpress
from bitpress.conformance.commands import command, install, plugins, refusal
from bitpress.conformance.models import write_model

# With little effort codes are coarse, with much they are fine; `multiple` is what it always is.
COARSE = """
EFFORTS = {"low": {"levels": 7}, "high": {"levels": 126, "multiple": 2}}
ALIASES = {"toy_coarse": {"levels": 3}}
"""

# Another scheme in the same words, which names no levels.
PLAIN = TOY.replace("Toy integers", "Integers of another name")


@pytest.fixture
def schemes(tmp_path: Path) -> Path:
    """`toy`, which has levels, and `plain`, which has none."""
    folder = tmp_path / "plugins"
    for name, module in (("toy", TOY + COARSE), ("plain", PLAIN)):
        entry_point = f"[bitpress.schemes]\n{name} = bitpress_scheme_{name}\n"
        install(folder, f"bitpress-scheme-{name}", module, entry_point)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def planned_options(plan: Any) -> list[dict[str, Any]]:
    """The options of each rule's only step."""
    return [attrs.asdict(step.options) for step in plan.recipe.all_steps]


def planned_efforts(*words: object, path: Path) -> tuple[list[dict[str, Any]], float]:
    """What `plan` says of every level, and the time of its own."""
    document = json.loads(command("plan", *words, "--json", path=path).stdout)
    return document["efforts"], document["seconds"]


def test_a_level_gives_a_scheme_the_options_that_it_names(schemes: Path, model: Path) -> None:
    with plugins(schemes):
        plans = {
            level: bitpress.plan(model, scheme="toy", effort=level)
            for level in ("low", "normal", "high")
        }
        default = bitpress.plan(model, scheme="toy")
        other = bitpress.plan(model, scheme="plain", effort="high")
    assert planned_options(plans["low"]) == [{"levels": 7, "multiple": 1}]
    assert planned_options(plans["high"]) == [{"levels": 126, "multiple": 2}]
    assert planned_options(plans["normal"]) == planned_options(default)
    assert planned_options(other) == planned_options(default) == [{"levels": 127, "multiple": 1}]


def test_what_a_user_sets_wins_over_the_level(schemes: Path, model: Path) -> None:
    layers = [
        {"match": "*.o_proj", "steps": ["toy"]},
        {"match": "*.down_proj", "steps": [{"use": "toy", "levels": 9}]},
        {"match": "*", "steps": ["TOY_COARSE"]},
    ]
    with plugins(schemes):
        for settings, levels in ((None, [126, 9, 3]), ({"levels": 20}, [20, 20, 20])):
            plan = bitpress.plan(model, recipe={"layers": layers}, settings=settings, effort="high")
            options = planned_options(plan)
            assert [step["levels"] for step in options] == levels
            assert [step["multiple"] for step in options] == [2, 2, 2]


def test_a_run_records_the_options_of_its_level_as_if_they_were_set(
    schemes: Path, model: Path, tmp_path: Path
) -> None:
    with plugins(schemes):
        by_level = bitpress.compress(model, tmp_path / "level", scheme="toy", effort="low")
        by_setting = bitpress.compress(
            model, tmp_path / "set", scheme="toy", settings={"levels": 7}
        )
        repeated = bitpress.compress(
            model, tmp_path / "repeated", recipe=by_level.recipe, effort="high"
        )
    assert by_level.recipe == by_setting.recipe == repeated.recipe
    written = {
        name: [(file.name, file.read_bytes()) for file in sorted(folder.glob("*.safetensors"))]
        for name in ("level", "set", "repeated")
        for folder in [tmp_path / name]
    }
    assert written["level"] == written["set"] == written["repeated"]


def test_the_command_line_takes_a_level_and_says_what_it_chose(
    schemes: Path, model: Path, tmp_path: Path
) -> None:
    words = ["compress", model, tmp_path / "out", "--scheme", "toy", "--effort", "high"]
    done = command(*words, "--set", "multiple=1", path=schemes)
    assert (done.returncode, done.stderr) == (0, "effort high: toy with levels=126\n")
    assert "--effort high" in (tmp_path / "out/README.md").read_text()

    for words in (["--scheme", "plain"], ["--scheme", "toy", "--set", "levels=5"]):
        done = command("plan", model, *words, "--effort", "low", path=schemes)
        assert done.stderr == f"effort low: {words[1]} as at normal effort\n"


def test_an_unknown_level_is_refused_in_one_line(schemes: Path, model: Path) -> None:
    words = ["plan", model, "--scheme", "toy", "--effort", "most"]
    assert "'most' is not one of 'low', 'normal', 'high'" in refusal(*words, path=schemes)
    with plugins(schemes):
        for function, arguments in (
            (bitpress.plan, {"scheme": "toy"}),
            (bitpress.recommend, {}),
        ):
            with pytest.raises(bitpress.BitpressError, match="effort: one of low, normal, high"):
                function(model, effort="most", **arguments)


def test_a_plan_says_what_each_level_chooses_and_costs(tmp_path: Path) -> None:
    model = runnable_model(tmp_path / "model")
    # at high effort the source is run backward too
    module = LEARNER + '\nEFFORTS = {"high": {"slopes": True}}\n'
    entry_point = "[bitpress.schemes]\nlearner = bitpress_scheme_learner\n"
    path = install(tmp_path / "plugins", "bitpress-scheme-learner", module, entry_point)
    words = [model, "--scheme", "learner", "--samples", 8, "--sequence-length", 64]

    efforts, seconds = planned_efforts(*words, path=path)
    assert [(effort["level"], effort["settings"]) for effort in efforts] == [
        ("low", ["slopes=false"]),
        ("normal", ["slopes=false"]),
        ("high", ["slopes=true"]),
    ]
    low, normal, high = (effort["seconds"] for effort in efforts)
    assert low == normal == seconds < high
    assert planned_efforts(*words, "--effort", "high", path=path) == (efforts, high)

    lines = command("plan", *words, path=path).stdout.splitlines()
    shown = [line.split(maxsplit=1)[1] for line in lines if line.startswith("effort")]
    assert [line.partition(" about")[0] for line in shown] == ["low:", "normal: as low", "high:"]
    assert shown[2].endswith(" (slopes=true)")

    settled = command("plan", *words, "--set", "slopes=true", path=path).stdout
    assert "effort  low, normal, high do the same here\n" in settled


def test_a_level_that_cannot_be_planned_says_why(schemes: Path, tmp_path: Path) -> None:
    module = schemes / "bitpress_scheme_toy.py"
    module.write_text(module.read_text().replace('"multiple": 2', '"multiple": 1000'))
    model = write_model(tmp_path / "model")
    efforts, _ = planned_efforts(model, "--scheme", "toy", path=schemes)
    assert [effort["refusal"] is None for effort in efforts] == [True, True, False]
    assert "is not a multiple of 1000" in efforts[2]["refusal"]
    shown = command("plan", model, "--scheme", "toy", path=schemes).stdout
    assert "effort  high: cannot be planned: layer " in shown


def test_a_level_of_a_composition_is_each_steps_own(tmp_path: Path, model: Path) -> None:
    # weights are kept as they are, and a step may follow
    keep = (
        TOY.partition("@hookimpl")[0]
        + """
@hookimpl
def quantize(layer): return layer

@hookimpl
def validate_hardware(hardware): return [Finding("supported", "runs anywhere")]

EFFORTS = {"high": {"levels": 5}}
"""
    )
    path = tmp_path / "plugins"
    for name, text in (("toy", TOY + COARSE), ("keep", keep)):
        entry_point = f"[bitpress.schemes]\n{name} = bitpress_scheme_{name}\n"
        install(path, f"bitpress-scheme-{name}", text, entry_point)
    efforts, _ = planned_efforts(model, "--scheme", "keep+toy", path=path)
    assert [effort["settings"] for effort in efforts] == [
        ["keep.levels=127", "toy.levels=7", "toy.multiple=1"],
        ["keep.levels=127", "toy.levels=127", "toy.multiple=1"],
        ["keep.levels=5", "toy.levels=126", "toy.multiple=2"],
    ]


def test_a_recommendation_compares_schemes_at_a_level(schemes: Path, model: Path) -> None:
    losses = """
MEASURED_LOSSES = [
    bitpress.MeasuredLoss("a model", 0.2),
    bitpress.MeasuredLoss("a model", 0.4, {"levels": 7}),
    bitpress.MeasuredLoss("a model", 0.3, {"levels": 12}),
]
"""
    module = schemes / "bitpress_scheme_toy.py"
    module.write_text(module.read_text() + losses)
    shown = {}
    for level in ("low", "normal"):
        words = ["recommend", model, "--serve-on", "A100", "--effort", level, "--json"]
        document = json.loads(command(*words, path=schemes).stdout)
        (toy,) = (item for item in document["alternatives"] if item["scheme"] == "toy")
        shown[level] = (toy["settings"], [loss["kl"] for loss in toy["measured"]])
        assert ("--set levels=7" in toy["command"]) == (level == "low")
    assert shown == {"low": (["levels=7"], [0.4]), "normal": ([], [0.2])}


@pytest.mark.parametrize(
    "efforts",
    ["['low']", "{'normal': {}}", "{'low': 'levels=7'}", "{'low': {'level': 7}}"],
)
def test_a_scheme_with_broken_levels_is_reported(schemes: Path, efforts: str) -> None:
    module = schemes / "bitpress_scheme_toy.py"
    module.write_text(f"{module.read_text()}\nEFFORTS = {efforts}\n")
    assert "problem: toy of bitpress-scheme-toy" in command("schemes", path=schemes).stderr


def test_schemes_shows_the_levels_of_a_scheme(schemes: Path) -> None:
    assert "--effort low: levels=7\n" in command("schemes", "toy", path=schemes).stdout
    assert "--effort" not in command("schemes", "plain", path=schemes).stdout
