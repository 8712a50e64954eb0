"""The Python API as people call it: with wrong types, in a notebook, with a log."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.learner_scheme import install_learner, runnable_model

import bitpress
from bitpress.conformance.commands import plugins
from bitpress.conformance.models import files_of, write_model

RECIPE = {"layers": [{"match": "*", "steps": ["toy"]}]}


@pytest.fixture
def model(tmp_path: Path, with_toy: Path) -> Path:
    return write_model(tmp_path / "model")


def test_types_that_mean_the_same_write_the_same(model: Path, tmp_path: Path) -> None:
    settings, head = {"levels": 100}, "*.o_proj"
    bitpress.compress(
        model, tmp_path / "plain", scheme="toy", settings=["levels=100"], ignore=[head]
    )
    manifest = bitpress.compress(
        str(model),
        str(tmp_path / "other"),
        recipe=RECIPE,
        settings=settings,
        ignore=head,
        copy=None,
        device=torch.device("cpu"),
        threads="2",  # type: ignore[arg-type]
        max_memory="20GB",
        samples=None,  # type: ignore[arg-type]
        progress=None,
    )
    assert manifest.recipe["layers"][0]["steps"] == [{"use": "toy", "levels": 100, "multiple": 1}]
    written = files_of(tmp_path / "plain")
    # the card gives the command
    assert files_of(tmp_path / "other") | {"README.md": b"", "bitpress.json": b""} == written | {
        "README.md": b"",
        "bitpress.json": b"",
    }
    # a manifest's recipe is one
    again = bitpress.plan(model, recipe=manifest.recipe)
    assert again.recipe.as_json() == manifest.recipe


def test_old_keywords_work_and_warn(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[[layers]]\nmatch = "*"\nsteps = ["toy"]\n')
    with pytest.warns(DeprecationWarning, match="recipe_file"):
        old = bitpress.plan(model, recipe_file=file)  # type: ignore[call-arg]
    assert old.digest == bitpress.plan(model, recipe=file).digest


CALLS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (bitpress.plan, {"scheme": pytest}, "scheme: the name of a scheme is expected, not module"),
    (bitpress.plan, {"model": 3, "scheme": "toy"}, "model: a folder or a Hub name"),
    (bitpress.plan, {"scheme": "toy", "recipe": RECIPE}, "either a scheme or a recipe"),
    (bitpress.plan, {"scheme": "toy", "serve_on": 90}, "serve_on: a device that serves"),
    (bitpress.plan, {"recipe": {"layers": "toy"}}, "recipe: it needs at least one [[layers]]"),
    (bitpress.compress, {"scheme": "toy", "samples": "few"}, "samples: a whole number"),
    (bitpress.compress, {"scheme": "toy", "out": None}, "out: a path is expected, not None"),
    (bitpress.compress, {"scheme": "toy", "max_memory": "much"}, "max_memory much: a size"),
    (bitpress.compress, {"scheme": "toy", "verify": "no"}, "verify: True or False"),
    (bitpress.compress, {"scheme": "toy", "progress": "yes"}, "progress: True, False or a"),
    (bitpress.compress, {"scheme": "toy", "device": "gpu"}, "device gpu: it is auto, cpu"),
    (bitpress.compress, {"scheme": "toy", "check": {"text": ""}}, "check: a file, a dataset"),
    (bitpress.search, {"schemes": "toy", "budget": 8}, "name two or more to choose from"),
    (bitpress.search, {"schemes": ["toy", "none"], "budget": "low"}, "budget: a number"),
    (bitpress.verify, {"out": 1}, "out: a path is expected, not 1"),
    (bitpress.verify, {"threads": 0}, "threads: 0 is not 1 or more"),
    (bitpress.verify, {"device": "gpu"}, "device gpu: it is auto, cpu"),
    (bitpress.inspect, {"out": None}, "out: a path is expected, not None"),
    (bitpress.report, {"out": RECIPE}, "out: a path is expected, not dict"),
    (bitpress.decompress, {"dense": 5}, "dense: a path is expected, not 5"),
    (bitpress.eval, {"text": 7}, "text: a file, a dataset"),
]


@pytest.mark.parametrize(("call", "arguments", "message"), CALLS)
def test_a_wrong_type_is_an_error_of_bitpress_in_one_line(
    model: Path, tmp_path: Path, call: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    defaults = {"model": model, "out": tmp_path / "out", "text": "t.txt", "dense": tmp_path / "d"}
    names = inspect.signature(call).parameters
    values = {name: value for name, value in defaults.items() if name in names} | arguments
    with pytest.raises(bitpress.BitpressError) as error:
        call(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def learned(tmp_path: Path) -> Path:
    return runnable_model(tmp_path / "learned")


def test_warnings_are_returned_recorded_and_logged(
    tmp_path: Path, learned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install_learner(tmp_path / "plugins")
    chats = [{"messages": [{"role": "user", "content": "hello"}]}]
    with plugins(tmp_path / "plugins"), caplog.at_level(logging.INFO, "bitpress"):
        manifest = bitpress.compress(
            learned,
            tmp_path / "out",
            scheme="learner",
            calibration=["word and word " * 200],
            samples=10_000,
            sequence_length=16,
        )
        assert bitpress.verify(tmp_path / "out").faults == ()
        with pytest.raises(bitpress.DataError, match="text 1 of the list: a chat, and"):
            bitpress.compress(learned, tmp_path / "no", scheme="learner", calibration=chats)
    assert any("of 10000 sequences of 16 tokens" in text for text in manifest.warnings)
    recorded = json.loads((tmp_path / "out/bitpress.json").read_text())["warnings"]
    assert recorded == list(manifest.warnings)
    messages = [record.getMessage() for record in caplog.records]
    assert set(manifest.warnings) <= set(messages)
    assert any(message.startswith("compressing: block 2/") for message in messages)


def test_models_are_judged_on_texts_of_a_list_too(learned: Path, tmp_path: Path) -> None:
    texts = (tmp_path / "text.txt").read_text().splitlines()
    install_learner(tmp_path / "plugins")
    with plugins(tmp_path / "plugins"):
        manifest = bitpress.compress(
            learned, tmp_path / "out", scheme="learner", calibration=texts, check=texts, samples=8
        )
        check = bitpress.eval(tmp_path / "out", texts, learned)
        file = bitpress.eval(tmp_path / "out", tmp_path / "text.txt", learned)
    assert manifest.check is not None
    assert check.text == manifest.check.text == "a list of texts"
    assert check.kl == manifest.check.kl == file.kl
    assert "--calibration FILE" in (tmp_path / "out/README.md").read_text()
    assert "--check FILE" in (tmp_path / "out/README.md").read_text()


def test_data_that_no_step_needs_is_remarked_on(model: Path, tmp_path: Path) -> None:
    manifest = bitpress.compress(model, tmp_path / "out", scheme="toy", calibration=["text"])
    assert manifest.warnings == ("no layer needs data: --calibration is not used",)


def test_the_log_is_quiet_until_somebody_listens(model: Path, tmp_path: Path, toy: Path) -> None:
    code = (
        "import sys, logging, bitpress\n"
        "if sys.argv[3:]: logging.basicConfig(level='INFO', format='%(name)s %(message)s')\n"
        "bitpress.compress(sys.argv[1], sys.argv[2], scheme='toy', calibration=['a'])\n"
    )

    def run(out: str, *arguments: str) -> str:
        words = [sys.executable, "-c", code, str(model), str(tmp_path / out), *arguments]
        environment = {"PYTHONPATH": ":".join([str(toy), *sys.path]), "TQDM_DISABLE": ""}
        return subprocess.run(
            words, env=environment, check=True, capture_output=True, text=True
        ).stderr

    assert run("quiet") == ""
    heard = run("heard", "listen")
    assert "bitpress no layer needs data" in heard
    assert "bitpress verifying: 0.4 MB" in heard


def test_progress_true_shows_bars_and_a_function_gets_every_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    bitpress.compress(model, tmp_path / "bars", scheme="toy", progress=True)
    shown = capfd.readouterr().err
    assert "compressing: 100%" in shown
    assert "verifying: 100%" in shown

    reports: list[tuple[str, int]] = []

    def progress(stage: str, num_bytes: int) -> Callable[..., None]:
        return lambda num_bytes, text="": reports.append((stage, num_bytes))

    bitpress.compress(model, tmp_path / "function", scheme="toy", progress=progress)
    assert {stage for stage, _ in reports} == {"compressing", "verifying"}


def test_the_report_is_the_command_s(model: Path, tmp_path: Path) -> None:
    bitpress.compress(model, tmp_path / "out", scheme="toy")
    page = bitpress.report(str(tmp_path / "out"))
    assert page == tmp_path / "out.html"
    assert page.read_text().startswith("<!doctype html>")
    other = bitpress.report(tmp_path / "out", tmp_path / "other.html")
    assert other.read_bytes() == page.read_bytes()


def test_a_revision_of_the_hub_is_fetched_and_recorded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--some--model/snapshots" / commit
    shutil.copytree(model, snapshot)
    requests: list[tuple[str, str | None]] = []

    def snapshot_download(name: str, *, revision: str | None, **options: Any) -> str:
        requests.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    manifest = bitpress.compress("some/model@v1.0", tmp_path / "out", scheme="toy")
    assert requests == [("some/model", "v1.0")]
    assert (manifest.source, manifest.revision) == ("some/model@v1.0", commit)
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: some/model\n" in card
    assert "bitpress compress some/model@v1.0 OUT" in card
    assert bitpress.verify(tmp_path / "out", against="some/model@v1.0").faults == ()
    assert bitpress.compress(model, tmp_path / "other", scheme="toy").revision is None
