"""`search` writes the recipe that costs least in a budget, by what each choice alone does to the
model's predictions.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fixtures.architectures import build
from fixtures.forked import ForkedCommand
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model
from fixtures.search_texts import write_search_texts
from fixtures.toy_scheme import install_short, install_toy

import bitpress
from bitpress.api import search
from bitpress.compression.search import predictions
from bitpress.compression.search.search_job import split_sequences
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import write_model
from bitpress.errors import RecipeError
from bitpress.modeling.block_runner import BlockRunner
from bitpress.planning import memory_estimate

TEXT = ("--samples", "16", "--sequence-length", "64", "--threads", "1")
CHEAP = {"samples": 16, "sequence_length": 64, "threads": 1}


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Path]:
    folder = install_short(install_learner(install_toy(tmp_path / "plugins")))
    with plugins(folder):
        yield folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return runnable_model(tmp_path / "model", config=CONFIG | {"num_hidden_layers": 2})


@pytest.mark.parametrize(
    ("scheme", "settings"),
    [
        ("short", []),
        ("learner", ["bits=3", "coarse=0.5"]),
        ("learner", ["bits=3", "factors=4 0.5"]),
    ],
    ids=["without data", "calibrated, inputs rounded", "rescaled"],
)
@pytest.mark.parametrize("layer", ["self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.usefixtures("installed")
def test_a_cost_is_the_kl_divergence_of_the_model_with_that_alone_compressed(
    model: Path, tmp_path: Path, scheme: str, settings: list[str], layer: str
) -> None:
    text = model.parent / "text.txt"
    options = {
        "schemes": [scheme, "none"],
        "budget": 200,
        "settings": settings,
        "calibration": text,
    }
    result = search(model, tmp_path / "r.toml", **options, **CHEAP)
    fitted, judged = write_search_texts(text, samples=16, length=64)
    name = f"model.layers.0.{layer}"
    (tmp_path / "one.toml").write_text(f'[[layers]]\nmatch = "{name}"\nsteps = ["{scheme}"]\n')
    bitpress.compress(
        model,
        tmp_path / "out",
        recipe=tmp_path / "one.toml",
        settings=settings,
        calibration=fitted,
        sequence_length=64,
        threads=1,
    )
    expected = bitpress.eval(tmp_path / "out", judged, model, sequence_length=64, threads=1).kl
    assert expected is not None
    assert expected > 1e-6
    assert result.divergences[name, scheme] == pytest.approx(expected, rel=1e-3)
    assert result.divergences[name, "none"] == 0


@pytest.mark.parametrize(
    ("count", "length"), [(1, 64), (2, 64), (5, 512), (64, 512), (1000, 512), (3, 8192)]
)
def test_no_sequence_that_candidates_are_fitted_to_judges_them(count: int, length: int) -> None:
    ids = torch.arange(count)[:, None].expand(count, length)
    fitted, judged = (set(part[:, 0].tolist()) for part in split_sequences(ids))
    assert fitted | judged == set(range(count))
    assert count == 1 or not fitted & judged
    assert 1 <= len(judged) <= max(4096 // length, 1)
    assert count < 3 or max(judged) - min(judged) >= min(len(judged), count) - 1


def test_the_recipe_keeps_to_the_budget_and_is_carried_out_as_it_stands(
    installed: Path, model: Path, tmp_path: Path
) -> None:
    recipe, text = tmp_path / "found.toml", model.parent / "text.txt"
    words = (
        "--budget",
        "6",
        "--schemes",
        "short, toy",
        "--out",
        recipe,
        "--calibration",
        text,
        *TEXT,
    )
    done = ForkedCommand("search", model, *words, "--json", path=installed)
    stdout, stderr = done.communicate(timeout=300)
    assert done.returncode == 0, stderr
    document = json.loads(stdout)
    assert {layer["chosen"] for layer in document["layers"]} == {"short", "toy"}
    plan = bitpress.plan(model, recipe=recipe)
    got = {module: stack.steps[0].scheme.name for stack in plan.stacks for module in stack.members}
    assert got == {
        module: layer["chosen"] for layer in document["layers"] for module in layer["modules"]
    }
    stored = sum(layer["candidates"][layer["chosen"]]["bytes"] for layer in document["layers"])
    assert 8 * stored == sum(
        stack.bits(m) * e.numel for stack in plan.stacks for m, e in stack.members.items()
    )
    assert (
        document["bits"]
        == 8 * stored / sum(e.numel for stack in plan.stacks for e in stack.members.values())
        <= 6.005
    )
    manifest = bitpress.compress(model, tmp_path / "out", recipe=recipe, threads=1)
    assert round(manifest.bits, 6) == round(document["bits"], 6)
    assert document["kl"] == pytest.approx(
        sum(layer["candidates"][layer["chosen"]]["kl"] for layer in document["layers"])
    )
    assert (
        document["everywhere"]["toy"]["kl"] < document["kl"] < document["everywhere"]["short"]["kl"]
    )


def test_people_get_a_table_and_a_file_they_can_read(
    installed: Path, model: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "found.toml"
    words = (
        "--budget",
        "6",
        "--schemes",
        "short,TOY,none",
        "--set",
        "short.levels=5",
        "--ignore",
        "*.1.mlp.*",
        "--out",
        recipe,
    )
    done = command(
        "search", model, *words, "--calibration", model.parent / "text.txt", *TEXT, path=installed
    )
    assert done.returncode == 0, done.stderr
    assert "TOY: taken as toy with its defaults\n" in done.stderr
    for part in (
        "model.layers.0.self_attn.[q_proj, k_proj, v_proj]",
        "short everywhere",
        "none everywhere",
        f"--recipe {recipe}",
    ):
        assert part in done.stdout
    text = recipe.read_text()
    together = ", ".join(f'"model.layers.0.self_attn.{x}_proj"' for x in "qkv")
    assert f"    {together},  # short " in text
    tables = tomllib.loads(text)["layers"]
    assert {"use": "short", "levels": 5} in [step for rule in tables for step in rule["steps"]]
    assert not [pattern for rule in tables for pattern in rule["match"] if "1.mlp" in pattern]
    assert "expected KL divergence" in text
    assert re.search(r"^# short everywhere: 4\.2\d bits per weight, 0\.\d{6}$", text, re.MULTILINE)


def test_one_scheme_with_several_settings_is_several_choices(
    installed: Path, model: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "found.toml"
    words = (
        "--budget",
        "99",
        "--schemes",
        "learner:bits=3,learner:bits=7:factors=4 0.5",
        "--out",
        recipe,
    )
    done = command(
        "search", model, *words, "--calibration", model.parent / "text.txt", *TEXT, path=installed
    )
    assert done.returncode == 0, done.stderr
    tables = tomllib.loads(recipe.read_text())["layers"]
    assert [rule["steps"] for rule in tables] == [
        [{"use": "learner", "bits": 7, "factors": "4 0.5"}]
    ]


def test_with_room_for_it_every_layer_gets_what_costs_least(
    installed: Path, model: Path, tmp_path: Path
) -> None:
    result = search(
        model,
        tmp_path / "r.toml",
        schemes=["short", "toy"],
        budget=99,
        calibration=model.parent / "text.txt",
        **CHEAP,
    )
    least = {
        u.name: min(("short", "toy"), key=lambda n: result.divergences[u.name, n])
        for u in result.search.units
    }
    assert result.choice == least


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_of_a_block_share_one_scheme(installed: Path, tmp_path: Path, family: str) -> None:
    source = build(family, tmp_path / "m")
    text = source.parent / "text.txt"
    result = search(
        source,
        tmp_path / "r.toml",
        schemes=["short", "toy"],
        budget=6.5,
        calibration=text,
        samples=8,
        sequence_length=32,
        threads=1,
    )
    # of 4 experts 3 layers each
    experts = [unit for unit in result.search.units if len(unit.modules) == 12]
    assert [unit.block for unit in experts] == [0, 1]
    assert all(len(unit.patterns) == 1 for unit in experts)
    assert all(result.divergences[unit.name, "short"] > 0 for unit in experts)
    plan = bitpress.plan(source, recipe=tmp_path / "r.toml")
    assert {m for stack in plan.stacks for m in stack.members} == {
        m for unit in result.search.units for m in unit.modules
    }


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ("--budget", "4", "--schemes", "short,toy"),
            ["--budget 4", "from 4.22 to 8.22 bits per weight"],
        ),
        (("--budget", "nan", "--schemes", "short,toy"), ["--budget nan", "from 4.22 to 8.22"]),
        (("--budget", "6", "--schemes", "short"), ["--schemes short", "two or more"]),
        (("--budget", "6", "--schemes", "none,none"), ["--schemes none", "two or more"]),
        (("--budget", "6", "--schemes", "short,nvfp5"), ["scheme 'nvfp5' is not installed"]),
        (("--budget", "6", "--schemes", "short,"), ["scheme '' is not installed"]),
        (
            ("--budget", "6", "--schemes", "short,toy:levels"),
            ["--schemes toy:levels", "NAME:OPTION=VALUE"],
        ),
        (("--budget", "6", "--schemes", "short,toy:level=3"), ["'level'", "levels"]),
        (
            ("--budget", "6", "--schemes", "short,toy", "--set", "levels=3"),
            ["short and toy both have it"],
        ),
        (
            ("--budget", "6", "--schemes", "short,toy", "--ignore", "*.up_prog"),
            ["'*.up_prog' matches none"],
        ),
        (
            ("--budget", "6", "--schemes", "short,toy", "--out", "missing/r.toml"),
            ["missing/r.toml", "no such folder"],
        ),
        (("--budget", "6", "--schemes", "short,toy", "--out", "."), ["is there already"]),
        (
            ("--budget", "6", "--schemes", "short,toy", "--max-memory", "1MB"),
            ["search needs about", "1 MB allowed"],
        ),
        (
            ("--budget", "6", "--schemes", "short,toy", "--calibration", "missing.txt"),
            ["missing.txt", "no such file"],
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(
    installed: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    parts: list[str],
) -> None:
    monkeypatch.chdir(model.parent)
    line = refusal("search", model, *words, path=installed)
    assert not [part for part in parts if part not in line], line
    assert not Path("recipe.toml").exists()


def test_a_budget_is_refused_from_headers_alone(installed: Path, tmp_path: Path) -> None:
    # without a tokenizer nothing could be run
    write_model(tmp_path / "bare")
    assert "--budget 4" in refusal(
        "search", tmp_path / "bare", "--budget", "4", "--schemes", "short,toy", path=installed
    )


def test_memory_that_is_short_changes_nothing(installed: Path, model: Path, tmp_path: Path) -> None:
    options = {
        "schemes": ["learner", "toy"],
        "budget": 99,
        "calibration": model.parent / "text.txt",
        **CHEAP,
    }
    with pytest.raises(RecipeError, match="the search needs about") as refused:
        search(model, tmp_path / "r.toml", max_memory=1, **options)
    least = 1_000_000 * (
        1 + int(re.findall(r"about ([\d,]+) MB", str(refused.value))[0].replace(",", ""))
    )
    with patch.object(tempfile, "TemporaryFile", wraps=tempfile.TemporaryFile) as files:
        held = search(model, tmp_path / "held.toml", **options)
        assert not files.called
        spilled = search(model, tmp_path / "spilled.toml", max_memory=least, **options)
        assert files.called
    assert held.divergences == spilled.divergences


def test_any_number_of_threads_finds_the_same(
    installed: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "BATCH_TOKENS", 96)
    options = {
        "schemes": ["learner", "toy"],
        "budget": 99,
        "calibration": model.parent / "text.txt",
        **CHEAP,
    }
    del options["threads"]
    results = [
        search(model, tmp_path / f"{threads}.toml", threads=threads, **options)
        for threads in (1, 2, 16)
    ]
    assert all(result.divergences == results[0].divergences for result in results)


def test_as_many_batches_run_side_by_side_as_there_are_threads(
    installed: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one sequence in each batch: four are judged
    monkeypatch.setattr(memory_estimate, "BATCH_TOKENS", 48)
    # it breaks unless both threads come to it
    meeting, run_block = threading.Barrier(2, timeout=60), BlockRunner._run_batch
    compare_batch = predictions.compare_batch

    def meet_running(*arguments: Any) -> Any:
        meeting.wait()
        return run_block(*arguments)

    def meet_comparing(*arguments: Any) -> Any:
        meeting.wait()
        return compare_batch(*arguments)

    monkeypatch.setattr(BlockRunner, "_run_batch", meet_running)
    monkeypatch.setattr(predictions, "compare_batch", meet_comparing)
    options = {"calibration": model.parent / "text.txt", "samples": 8, "sequence_length": 48}
    schemes = ["toy", "none"]
    search(model, tmp_path / "r.toml", schemes=schemes, budget=99, threads=2, **options)
