"""Real vLLM's loader places every tensor of what we make of small models of many architectures, and
leaves no parameter unfilled.

No weight is read and nothing computes: names, dtypes, shapes and parts are vLLM's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from fixtures.architecture_matrix import COLUMNS
from fixtures.small_model_tables import IN_VLLM, LOADED_BY_VLLM
from fixtures.small_models import build_small_model

from bitpress import BitpressError
from bitpress.conformance.models import LLAMA, llama_tensors, write_model

Faults = Mapping[str, Sequence[str]]
Load = Callable[[Sequence[Path]], Faults]


def outputs(source: Path) -> Iterator[Path]:
    """What every scheme makes of a model, but for those that refuse it."""
    for name, column in COLUMNS.items():
        out = source.with_name(name.replace(", ", "-"))
        try:
            column.compress(source, out)
        except BitpressError:
            continue
        yield out


@pytest.fixture(scope="module")
def faults(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Faults]:
    """What vLLM says of the source and the outputs of each architecture, by folder."""
    root = tmp_path_factory.mktemp("models")
    folders: list[Path] = []
    for architecture in IN_VLLM:
        source = build_small_model(architecture, root / architecture / "model")
        folders += [source, *outputs(source)]
    result: dict[str, dict[str, Sequence[str]]] = {}
    for name, texts in load(folders).items():
        result.setdefault(Path(name).parent.name, {})[Path(name).name] = texts
    return result


@pytest.mark.parametrize("architecture", IN_VLLM)
def test_no_parameter_is_unfilled(faults: Mapping[str, Faults], architecture: str) -> None:
    by_folder = dict(faults[architecture])
    if of_source := by_folder.pop("model"):
        pytest.skip(f"vLLM does not load the source whole: {of_source[0]}")
    assert {out: texts for out, texts in by_folder.items() if texts} == {}


def test_vllm_loads_what_the_documentation_says(faults: Mapping[str, Faults]) -> None:
    whole = [
        architecture
        for architecture, by_folder in faults.items()
        if len(by_folder) > 1 and not any(by_folder.values())
    ]
    assert sorted(whole) == sorted(LOADED_BY_VLLM)


def test_a_model_whose_sequences_are_short_is_asked_for_no_longer_ones(
    load: Load, tmp_path: Path
) -> None:
    config = LLAMA | {"max_position_embeddings": 64}
    model = write_model(tmp_path / "model", llama_tensors(config=config), config)
    assert load([model]) == {str(model): []}
