"""Texts, numbers and tokenizers that cannot be used are refused in one line that says where and what."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from calibrated import TINY_CONFIG as CONFIG, tokenizer_folder

from bitpress import CheckpointError, DataError
from bitpress.calibrate.texts import Choice, load


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tokenizer_folder(tmp_path / "model")


REFUSED_FILES = [
    ("a.jsonl", b"", "it holds no text"),
    ("a.txt", b" \n ", "it holds no text"),
    ("a.txt", b"Too short.", "a.txt: it gives [0-9]+ tokens, too few"),
    ("a.txt", b"caf\xe9", "not UTF-8 text"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}', "a.jsonl, line 2: it is not UTF-8 text"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": ', "a.jsonl, line 3: not valid JSON"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not valid JSON"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"prompt": "a", "answer": "b"}',
        "a.jsonl, line 2: an object .* not one with 'prompt', 'answer'",
    ),
    ("a.jsonl", b'{"text": 3}', "a.jsonl, line 1: an object"),
    ("a.jsonl", b"[1]", "a.jsonl, line 1: an object"),
    ("a.jsonl", b'{"messages": []}', "a.jsonl, line 1: an object"),
    ("a.jsonl", b'{"messages": ["hello"]}', "a.jsonl, line 1: an object"),
    ("a.jsonl", rb'{"text": "half \ud83d"}', "a.jsonl, line 1: half of a surrogate pair"),
    ("a.md", b"text", r"a.md: texts are read from \.jsonl"),
]


@pytest.mark.parametrize(("name", "content", "expected"), REFUSED_FILES)
def test_a_file_that_holds_no_texts_is_refused(model: Path, tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as refusal:
        load(Choice(str(tmp_path / name)), model, CONFIG)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_file_that_is_not_there_is_said_with_the_nearest_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").touch()
    with pytest.raises(DataError, match=r"there is no such file; did you mean 'texts.jsonl'\?"):
        load(Choice(str(tmp_path / "text.jsonl")), model, CONFIG)


@pytest.mark.parametrize(("module", "source", "extra"), [("pyarrow", "a.parquet", "parquet"), ("datasets", "a/name", "datasets")])
def test_a_missing_library_is_said_with_the_extra_that_brings_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"bitpress-core\[{extra}\]"):
        load(Choice(source), model, CONFIG)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 0}, {"seed": -1}, {"seed": 2**63}])
def test_numbers_that_cannot_be_are_refused(model: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="at least 1"):
        load(Choice(**wrong), model, CONFIG)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_folder_without_a_usable_tokenizer_is_refused(model: Path, content: str | None) -> None:
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer.json").unlink() if content is None else (model / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="no usable tokenizer") as refusal:
        load(Choice(), model, CONFIG)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_tokenizer_of_another_model_is_refused(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"token id \d+ .* vocab_size is 1000"):
        load(Choice(), model, {**CONFIG, "vocab_size": 1000})
