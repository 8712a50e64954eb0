"""Real vLLM's loader fills the model that drafts tokens from what we make of models that hold one.

No weight is read and nothing computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from fixtures.draft_models import DRAFT_MODELS, build_draft_model

import bitpress
from bitpress.checkpoint.model_config import KEY

SETTINGS = {
    "fp8": {},
    "w4a16": {"algorithm": "rtn", "group_size": "32"},
    "int8": {"algorithm": "rtn"},
}
UNLISTED = "unlisted"

Faults = Mapping[str, Sequence[str]]
Load = Callable[[Sequence[Path]], Faults]


def without_names_of_drafts(out: Path) -> None:
    """A config that ignores drafts under the names of the files alone."""
    config = json.loads((out / "config.json").read_text())
    names = config[KEY]["ignore"]
    config[KEY]["ignore"] = [name for name in names if not name.startswith("re:model")]
    (out / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def faults(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Faults]:
    """What vLLM says of each model, and of what every scheme makes of it."""
    root = tmp_path_factory.mktemp("drafts")
    folders: list[Path] = []
    for name in DRAFT_MODELS:
        source = build_draft_model(name, root / name / "model")
        folders.append(source)
        for scheme, settings in SETTINGS.items():
            folders.append(source.with_name(scheme))
            bitpress.compress(source, folders[-1], scheme=scheme, settings=settings)
        folders.append(source.with_name(UNLISTED))
        bitpress.compress(source, folders[-1], scheme="fp8")
        without_names_of_drafts(folders[-1])
    result: dict[str, dict[str, Sequence[str]]] = {}
    for folder, texts in load(folders).items():
        result.setdefault(Path(folder).parent.name, {})[Path(folder).name] = texts
    return result


@pytest.mark.parametrize("name", DRAFT_MODELS)
def test_the_model_that_drafts_is_filled(faults: Mapping[str, Faults], name: str) -> None:
    of_outputs = {out: texts for out, texts in faults[name].items() if out != UNLISTED}
    assert of_outputs == {out: [] for out in ("model", *SETTINGS)}


@pytest.mark.parametrize("name", ["MiMoForCausalLM", "Ernie4_5_MoeForCausalLM"])
def test_it_is_not_filled_where_only_the_names_of_the_files_are_ignored(
    faults: Mapping[str, Faults], name: str
) -> None:
    assert any("layers.2.mtp_block" in text for text in faults[name][UNLISTED])
