"""`search` under a budget in bytes, with real schemes: head, embeddings and cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures.search_texts import write_search_texts
from fixtures.small_models import build_small_model

import bitpress
from bitpress.compression.search.result import SearchResult
from bitpress.conformance.models import tensors_of

HEAD, EMBEDDINGS = "lm_head", "model.embed_tokens"
SAMPLES, LENGTH, TOKENS = 16, 48, 2000
SCHEMES = ["w4a16:group_size=32", "w8a16:group_size=32", "fp8", "kv-fp8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose class in vLLM looks for head and embeddings in the config."""
    return build_small_model("Qwen3ForCausalLM", tmp_path_factory.mktemp("qwen3") / "m")


def search(model: Path, out: Path, budget: str, **options: Any) -> SearchResult:
    arguments = {
        "schemes": SCHEMES,
        "calibration": model.parent / "text.txt",
        "samples": SAMPLES,
        "sequence_length": LENGTH,
        "threads": 1,
        **options,
    }
    return bitpress.search(model, out, budget=budget, cache_tokens=TOKENS, **arguments)


@pytest.fixture(scope="module")
def ample(model: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(model, tmp_path_factory.mktemp("ample") / "r.toml", "1GB")


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_the_cost_of_embeddings_is_the_kl_divergence_of_the_model_with_these_alone_compressed(
    model: Path, ample: SearchResult, tmp_path: Path, name: str
) -> None:
    _, judged = write_search_texts(model.parent / "text.txt", SAMPLES, LENGTH)
    steps = [{"use": name, "group_size": 32}]
    recipe = {"layers": [{"match": "embed_tokens", "steps": steps}]}
    bitpress.compress(model, tmp_path / "o", recipe=recipe, threads=1)
    expected = bitpress.eval(tmp_path / "o", judged, model, sequence_length=LENGTH, threads=1).kl
    assert expected is not None
    assert expected > 1e-7
    assert ample.divergences[EMBEDDINGS, f"{name}:group_size=32"] == pytest.approx(
        expected, rel=1e-2
    )


def test_a_format_in_which_no_engine_looks_up_rows_is_no_choice_for_embeddings(
    ample: SearchResult,
) -> None:
    (embeddings,) = [unit for unit in ample.search.units if unit.name == EMBEDDINGS]
    assert embeddings.candidates == (*SCHEMES[:2], "none")
    assert any(
        note.startswith("fp8 is no choice for the embeddings: ") for note in ample.search.notes
    )
    (head,) = [unit for unit in ample.search.units if unit.name == HEAD]
    assert head.candidates == (*SCHEMES[:3], "none")


def test_the_smallest_choice_is_written_as_it_was_measured(
    model: Path, ample: SearchResult, tmp_path: Path
) -> None:
    smallest = ample.search.other_bytes + sum(
        min(map(unit.num_bytes, unit.candidates)) for unit in ample.search.choices
    )
    result = search(model, tmp_path / "r.toml", f"{smallest}B")
    assert result.choice[HEAD] == result.choice[EMBEDDINGS] == "w4a16:group_size=32"
    assert result.choice["cache"] == "kv-fp8"

    # layers of blocks are fitted to data, and what lies outside is rounded
    plan = bitpress.plan(model, recipe=tmp_path / "r.toml")
    chosen = {
        module: stack.steps
        for unit in result.search.units
        for stack in unit.stacks[result.choice[unit.name]]
        for module in stack.members
    }
    written = {module: stack.steps for stack in plan.stacks for module in stack.members}
    assert {module: [step.options for step in steps] for module, steps in written.items()} == {
        module: [step.options for step in steps] for module, steps in chosen.items()
    }
    assert {written[HEAD][0].calibrated, written[EMBEDDINGS][0].calibrated} == {False}
    assert all(steps[0].calibrated for module, steps in written.items() if ".layers." in module)

    out = tmp_path / "o"
    bitpress.compress(
        model,
        out,
        recipe=tmp_path / "r.toml",
        calibration=model.parent / "text.txt",
        samples=SAMPLES,
        sequence_length=LENGTH,
        threads=1,
    )
    assert not bitpress.verify(out, against=model).faults
    assert sum(x.nbytes for x in tensors_of(out).values()) == result.weight_bytes()
    assert result.weight_bytes() + result.cache_bytes() == smallest
