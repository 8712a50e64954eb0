"""A stranger's output folder: whatever its `bitpress.json` says, one clear line at most, soon, and
nothing outside the folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures.hostile_values import JSON, amounts, only_clear_errors, tried
from fixtures.learner_scheme import CONFIG, runnable_model
from fixtures.signed_manifest import sign
from fixtures.toy_scheme import install_toy
from hypothesis import given, strategies as st

import bitpress
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import files_of

Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `plugins`, `model`, `text.txt`, and `out`, a checked output of the model."""
    folder = tmp_path_factory.mktemp("made")
    model = runnable_model(folder / "model", config=CONFIG | {"num_hidden_layers": 1})
    with plugins(install_toy(folder / "plugins")):
        bitpress.compress(model, folder / "out", scheme="toy", check=folder / "text.txt", threads=1)
    manifest = json.loads((folder / "out/bitpress.json").read_text())
    data = {"source": "texts", "tokens": "10", "sha256": "0" * 64}
    full = manifest | {
        "data": data,
        "blocks": {"model.layers.0": 0.1},
        "rescaled": {"a": {"rows": [1]}},
        "warnings": ["hot"],
    }
    (folder / "whole.json").write_text(json.dumps(full))
    return folder


def places(value: Any, path: Place = ()) -> Iterator[Place]:
    """Where something may be replaced in a JSON value; of lists and tables with many like items, in
    the first and the last.
    """
    yield path
    items = list(
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items if len(items) < 12 else items[:: len(items) - 1]:
        yield from places(item, (*path, key))


def replaced(value: Any, path: Place, by: Any) -> Any:
    """The value with something else there."""
    if not path:
        return by
    changed = copy.copy(value)
    changed[path[0]] = replaced(value[path[0]], path[1:], by)
    return changed


@amounts(25, 2500)
def test_any_manifest_is_understood_or_refused_by_every_command(
    outputs: Path, tmp_path: Path, count: int
) -> None:
    whole, out, dense = (
        json.loads((outputs / "whole.json").read_text()),
        tmp_path / "out",
        tmp_path / "dense",
    )
    for name, data in files_of(outputs / "out").items():
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(data)
    odd = st.sampled_from(
        [
            2**62,
            [2**62, 2**62],
            [0, 8],
            [1, 2**40],
            "$\\frac$",
            "../../x",
            "\x1b[31m",
            1e308,
            float("inf"),
        ]
    )

    @tried(count)
    @given(st.sampled_from(list(places(whole))), JSON | odd)
    def law(path: Place, other: Any) -> None:
        manifest = replaced(whole, path, other)
        sign(out, manifest) if isinstance(manifest, dict) else (out / "bitpress.json").write_text(
            json.dumps(manifest)
        )
        with plugins(outputs / "plugins"):
            with only_clear_errors():
                bitpress.verify(out, outputs / "model", threads=1)
            with only_clear_errors():
                bitpress.decompress(out, dense)
                assert {file.parent for file in dense.rglob("*")} == {dense}
        for words in (
            ["inspect", out],
            ["inspect", out, "--json"],
            ["report", out, "--html", tmp_path / "page.html"],
        ):
            completed = command(*words, path=outputs / "plugins")
            assert completed.returncode in (0, 2)
            assert len(completed.stderr.splitlines()) == completed.returncode / 2
            assert "\x1b" not in completed.stdout + completed.stderr
        for file in files_of(dense) if dense.exists() else ():
            (dense / file).unlink()

    law()


def changed(outputs: Path, folder: Path, **values: Any) -> Path:
    """A copy of the output whose manifest says something else."""
    folder.mkdir()
    for name, data in files_of(outputs / "out").items():
        (folder / name).write_bytes(data)
    sign(folder, json.loads((folder / "bitpress.json").read_text()) | values)
    return folder


def test_no_command_shows_a_text_that_a_terminal_would_obey(outputs: Path, tmp_path: Path) -> None:
    whole, evil = json.loads((outputs / "whole.json").read_text()), "a\x1b[31m\x9b2J\rb\u202e"
    texts = {
        "source": evil,
        "bitpress": evil,
        "schemes": {"toy": evil},
        "check": whole["check"] | {"text": evil},
        "data": whole["data"] | {"source": evil},
        "warnings": [evil],
    }
    out = changed(outputs, tmp_path / "out", **texts)
    for words in (["inspect", out], ["inspect", out, "--json"], ["verify", out]):
        completed = command(*words, path=outputs / "plugins")
        shown = completed.stdout + completed.stderr
        assert not {character for character in evil if not character.isprintable()} & {*shown}
    assert r"a\x1b[31m\x9b2J\rb\u202e" in command("inspect", out, path=outputs / "plugins").stdout


@pytest.mark.parametrize(
    "words", [["decompress", "dense"], ["eval", "--text", "text.txt"]], ids=["decompress", "eval"]
)
def test_an_output_that_is_not_as_it_was_written_is_not_used(
    outputs: Path, tmp_path: Path, words: list[str]
) -> None:
    layers = json.loads((outputs / "out/bitpress.json").read_text())["layers"]
    first, manifest = next(iter(layers.items()))
    out = changed(
        outputs,
        tmp_path / "out",
        layers=layers
        | {first: manifest | {"shape": [manifest["shape"][0] * 2, manifest["shape"][1]]}},
    )
    paths = {"dense": tmp_path / "dense", "text.txt": outputs / "text.txt"}
    line = refusal(
        words[0], out, *(paths.get(word, word) for word in words[1:]), path=outputs / "plugins"
    )
    assert f"is not as it was written: {first}: tensor {first}.weight is I8" in line
    assert not (tmp_path / "dense").exists()


def test_a_file_outside_the_folder_is_not_looked_at(outputs: Path, tmp_path: Path) -> None:
    files = json.loads((outputs / "out/bitpress.json").read_text())["files"]
    out = changed(
        outputs, tmp_path / "out", files=files | {"../private.key": {"bytes": 1, "sha256": None}}
    )
    assert "'../private.key' is no file of the folder" in refusal(
        "verify", out, path=outputs / "plugins"
    )


def test_a_page_shows_names_that_would_be_formulas_or_markup(outputs: Path, tmp_path: Path) -> None:
    layers = json.loads((outputs / "out/bitpress.json").read_text())["layers"]
    odd = {
        "model.layers.0.$\\nothing$": next(iter(layers.values())),
        "model.layers.0.<script>x": next(iter(layers.values())),
    }
    out = changed(outputs, tmp_path / "out", layers=layers | odd)
    assert (
        command("report", out, "--html", tmp_path / "page.html", path=outputs / "plugins").stderr
        == ""
    )
    page = (tmp_path / "page.html").read_text()
    assert "$\\nothing$" in page
    assert "<script>" not in page


@pytest.mark.parametrize("name", ["model/config.json", "out/config.json", "model"])
def test_a_report_takes_the_place_of_an_earlier_one_and_of_nothing_else(
    outputs: Path, tmp_path: Path, name: str
) -> None:
    before = files_of(outputs)
    assert f"{name} is there and no page" in refusal(
        "report", outputs / "out", "--html", outputs / name, path=outputs / "plugins"
    )
    assert files_of(outputs) == before
    for _ in range(2):
        assert (
            command(
                "report",
                outputs / "out",
                "--html",
                tmp_path / "page.html",
                path=outputs / "plugins",
            ).returncode
            == 0
        )
