"""Under a budget in bytes, `search` chooses for the head and the cache too."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.cache_scheme import install_cache_scheme
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model
from fixtures.search_texts import write_search_texts
from fixtures.toy_scheme import install_short, install_toy

import bitpress
from bitpress.compression.search.result import SearchResult
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import llama_tensors, tensors_of
from bitpress.planning import memory_estimate

HEAD, CACHE = "lm_head", "cache"
TOKENS = 1000
CHEAP = {"samples": 16, "sequence_length": 64, "threads": 1}
WORDS = ("--samples", "16", "--sequence-length", "64", "--threads", "1")
SCHEMES = ["short", "toy", "cache-int8"]


@pytest.fixture(autouse=True)
def installed(tmp_path: Path) -> Iterator[Path]:
    folder = install_short(install_learner(install_toy(tmp_path / "plugins")))
    with plugins(install_cache_scheme(folder)):
        yield folder


def write_model(folder: Path, **changes: Any) -> Path:
    """A model in float32, which computes alike in a search and in a run."""
    config = CONFIG | {"num_hidden_layers": 2, **changes}
    tensors = {name: x.float() for name, x in llama_tensors(config=config).items()}
    return runnable_model(folder, tensors, config)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def search(model: Path, budget: str, **options: Any) -> SearchResult:
    arguments = {"schemes": SCHEMES, "calibration": model.parent / "text.txt", **CHEAP, **options}
    return bitpress.search(
        model, model.parent / f"{budget}.toml", budget=budget, cache_tokens=TOKENS, **arguments
    )


def count_smallest(result: SearchResult) -> int:
    """Bytes of the smallest choice."""
    units = result.search.choices
    return result.search.other_bytes + sum(
        min(map(unit.num_bytes, unit.candidates)) for unit in units
    )


def measure_alone(model: Path, recipe: dict[str, Any]) -> float:
    """The KL divergence of a model that a recipe compresses, on the texts that a search judges."""
    fitted, judged = write_search_texts(model.parent / "text.txt", samples=16, length=64)
    out = model.parent / "alone"
    bitpress.compress(model, out, recipe=recipe, calibration=fitted, sequence_length=64, threads=1)
    kl = bitpress.eval(out, judged, model, sequence_length=64, threads=1).kl
    assert kl is not None
    return kl


@pytest.mark.parametrize("scheme", ["toy", "short"])
def test_the_cost_of_a_head_is_the_kl_divergence_of_the_model_with_that_alone_compressed(
    model: Path, scheme: str
) -> None:
    result = search(model, "1GB")
    expected = measure_alone(model, {"layers": [{"match": HEAD, "steps": [scheme]}]})
    assert expected > 1e-6
    assert result.divergences[HEAD, scheme] == pytest.approx(expected, rel=1e-3)
    assert result.divergences[HEAD, "none"] == 0


def test_the_cost_of_a_head_counts_that_its_inputs_are_rounded(
    model: Path, installed: Path
) -> None:
    # a scheme that rounds inputs to multiples of 1/2, and needs no data
    (module,) = installed.rglob("bitpress_scheme_learner.py")
    text = module.read_text().replace(
        "def rescales(self)",
        "def calibrated(self): return False\n\n    @property\n    def rescales(self)",
    )
    module.write_text(text)
    with plugins(installed):
        result = search(model, "1GB", schemes=["learner:coarse=0.5", "toy"])
        steps = [{"use": "learner", "coarse": 0.5}]
        expected = measure_alone(model, {"layers": [{"match": HEAD, "steps": steps}]})
    assert expected > 10 * result.divergences[HEAD, "toy"]
    assert result.divergences[HEAD, "learner:coarse=0.5"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("layers", ["toy", "learner"], ids=["without data", "with data"])
def test_the_cost_of_a_cache_is_the_kl_divergence_of_the_model_with_that_alone_rounded(
    model: Path, layers: str
) -> None:
    # coarse, so that the divergence is far above what float32 makes of it
    cache = {"use": "cache-int8", "levels": 7}
    result = search(model, "1GB", schemes=[layers, "cache-int8:levels=7"])
    expected = measure_alone(model, {"cache": cache})
    assert expected > 1e-5
    assert result.divergences[CACHE, "cache-int8:levels=7"] == pytest.approx(expected, rel=1e-3)
    assert result.divergences[CACHE, "none"] == 0


def test_units_of_blocks_cost_what_they_cost_without_the_others(model: Path) -> None:
    alone = bitpress.search(
        model,
        model.parent / "alone.toml",
        schemes=["short", "toy"],
        budget=99,
        calibration=model.parent / "text.txt",
        **CHEAP,
    )
    together = search(model, "1GB")
    assert alone.divergences.keys() < together.divergences.keys()
    assert alone.divergences == {item: together.divergences[item] for item in alone.divergences}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_the_choice_costs_least_of_all_that_keep_to_the_budget(
    tmp_path: Path, share: float
) -> None:
    model = write_model(tmp_path / "one", num_hidden_layers=1)
    everything = search(model, "1GB")
    names, candidates, sizes = [], [], []
    for unit in everything.search.choices:
        names.append(unit.name)
        candidates.append(unit.candidates)
        sizes.append({name: unit.num_bytes(name) for name in unit.candidates})
    choices = [
        (
            everything.search.other_bytes
            + sum(size[name] for size, name in zip(sizes, choice, strict=True)),
            sum(everything.divergences[item] for item in zip(names, choice, strict=True)),
        )
        for choice in itertools.product(*candidates)
    ]
    smallest, largest = min(choices)[0], max(choices)[0]
    limit = int(smallest + share * (largest - smallest))
    found = search(model, f"{limit}B")
    assert found.weight_bytes() + found.cache_bytes() <= limit
    least = min(cost for size, cost in choices if size <= limit)
    assert found.divergence() == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("budget", ["0.62MB", "0.9MB", "1GB"])
def test_sizes_are_those_of_what_is_written(model: Path, budget: str) -> None:
    result = search(model, budget)
    recipe, out = model.parent / f"{budget}.toml", model.parent / "out"
    bitpress.compress(
        model, out, recipe=recipe, calibration=model.parent / "text.txt", samples=16, threads=1
    )
    assert not bitpress.verify(out, against=model).faults
    assert sum(x.nbytes for x in tensors_of(out).values()) == result.weight_bytes()
    plan = bitpress.plan(model, recipe=recipe)
    # 2 blocks, keys and values, 2 heads of 32 channels in 4 bytes
    kept = sum(cache.token_bytes[1] for cache in plan.caches) or 2 * 2 * 2 * 32 * 4
    assert TOKENS * kept == result.cache_bytes()


def test_the_recipe_gives_head_and_cache_what_was_chosen(model: Path) -> None:
    ample = search(model, "1GB")
    tight = search(model, f"{count_smallest(ample)}B")
    assert tight.choice[HEAD] == "short"
    assert tight.choice[CACHE] == "cache-int8"
    plan = bitpress.plan(model, recipe=model.parent / f"{count_smallest(ample)}B.toml")
    got = {module: stack.steps[0].scheme.name for stack in plan.stacks for module in stack.members}
    assert got == {
        module: tight.choice[unit.name] for unit in tight.search.units for module in unit.modules
    }
    assert [cache.step.scheme.name for cache in plan.caches] == ["cache-int8"] * 2

    assert ample.choice[HEAD] == ample.choice[CACHE] == "none"
    plan = bitpress.plan(model, recipe=model.parent / "1GB.toml")
    assert HEAD not in plan.fragments
    assert not plan.caches
    text = (model.parent / "1GB.toml").read_text()
    assert "\n# lm_head stays as it is: short 0." in text
    assert "cache" not in tomllib.loads(text)


def test_bits_are_of_the_layers_of_blocks_alone(model: Path) -> None:
    result = bitpress.search(
        model,
        model.parent / "r.toml",
        schemes=["short", "toy"],
        budget=6,
        calibration=model.parent / "text.txt",
        **CHEAP,
    )
    assert HEAD not in result.choice
    assert CACHE not in result.choice
    assert HEAD not in (model.parent / "r.toml").read_text()


def test_a_cache_is_counted_where_no_scheme_for_it_is_named(model: Path) -> None:
    result = search(model, "1GB", schemes=["short", "toy"])
    assert result.choice[CACHE] == "none"
    assert result.cache_bytes() == TOKENS * 2 * 2 * 2 * 32 * 4
    smallest = count_smallest(result)
    tight = search(model, f"{smallest}B", schemes=["short", "toy"])
    assert tight.weight_bytes() + tight.cache_bytes() == smallest


def test_people_and_programs_are_told_of_head_and_cache(model: Path, installed: Path) -> None:
    words = [
        *("search", model, "--budget", "0.62MB", "--cache-tokens", TOKENS),
        *("--schemes", "short,toy,cache-int8", "--calibration", model.parent / "text.txt", *WORDS),
    ]
    shown = command(*words, "--out", model.parent / "a.toml", path=installed)
    assert shown.returncode == 0, shown.stderr
    assert "chosen for the cache: cache-int8" in shown.stdout
    assert "lm_head" in shown.stdout
    assert "embeddings left alone: vLLM" in shown.stderr
    document = json.loads(
        command(*words, "--out", model.parent / "b.toml", "--json", path=installed).stdout
    )
    assert document["budget"] is None
    assert document["bytes"] + document["cache"]["bytes"] <= document["budget_bytes"] == 620_000
    assert document["layers"][-1]["name"] == HEAD
    assert document["cache"]["candidates"]["cache-int8"]["bytes_per_token"] == 256
    assert document["cache"]["candidates"]["none"]["bytes_per_token"] == 1024
    head = (model.parent / "a.toml").read_text().partition("[[layers]]")[0]
    for part in ("--budget 0.62MB", f"--cache-tokens {TOKENS}", "MB of cache", "256 bytes"):
        assert part in head


@pytest.mark.parametrize(
    ("options", "changes", "remark"),
    [
        ({}, {"tie_word_embeddings": True}, "head left alone: it is tied to the embeddings"),
        ({"ignore": [HEAD]}, {}, "head left alone: ignored by 'lm_head'"),
        (
            {"schemes": ["learner", "toy"]},
            {},
            "learner is no choice for the head: search rounds both head and embeddings without",
        ),
    ],
    ids=["tied", "ignored", "needs data"],
)
def test_a_head_that_is_no_choice_is_named_with_the_reason(
    tmp_path: Path, options: dict[str, Any], changes: dict[str, Any], remark: str
) -> None:
    model = write_model(tmp_path / "m", **changes)
    result = search(model, "1GB", **options)
    assert any(note.startswith(remark) for note in result.search.notes)
    heads = [unit for unit in result.search.units if unit.name == HEAD]
    assert [unit.candidates for unit in heads] == (
        [] if "left alone" in remark else [("toy", "none")]
    )


def test_neither_threads_nor_memory_change_anything(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "BATCH_TOKENS", 96)
    first, *others = [search(model, f"{threads}GB", threads=threads) for threads in (1, 2, 4)]
    assert all(other.divergences == first.divergences for other in others)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ("--budget", "0.2MB", "--schemes", "short,toy"),
            ["--budget 0.2MB: by short, toy the model takes from", " bytes; give more"],
        ),
        (
            ("--budget", "0.5MB", "--schemes", "short,toy", "--cache-tokens", "8192"),
            ["with the cache of 8,192 tokens"],
        ),
        (("--budget", "many", "--schemes", "short,toy"), ["a size such as 4GB", "'many'"]),
        (
            ("--budget", "6", "--schemes", "short,toy", "--cache-tokens", "9"),
            ["--budget 6: bits of weights say nothing of a cache"],
        ),
        (
            ("--budget", "6", "--schemes", "short,toy,cache-int8"),
            ["--schemes cache-int8: it is for the cache", "--cache-tokens 8192"],
        ),
        (
            ("--budget", "4GB", "--schemes", "short,toy,cache-int8"),
            ["--schemes cache-int8: it is for the cache", "--cache-tokens 8192"],
        ),
        (
            ("--budget", "4GB", "--schemes", "short,toy+cache-int8"),
            ["a scheme for the cache is a choice of its own"],
        ),
        (
            ("--budget", "4GB", "--schemes", "short,cache-int8,cache-int8:levels=7"),
            ["cache-int8 and cache-int8:levels=7 are both for the cache"],
        ),
        (
            ("--budget", "4GB", "--schemes", "none,cache-int8"),
            ["--schemes none,cache-int8: name a scheme for layers too"],
        ),
    ],
)
def test_what_a_budget_in_bytes_cannot_mean_is_refused_in_one_line(
    model: Path, installed: Path, words: tuple[str, ...], parts: list[str]
) -> None:
    line = refusal("search", model, *words, "--out", model.parent / "r.toml", path=installed)
    assert not [part for part in parts if part not in line], line
    assert not (model.parent / "r.toml").exists()
