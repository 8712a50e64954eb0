"""Texts, numbers and tokenizers that cannot be used are refused in one line that says where and
what.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import sys
from contextlib import nullcontext
from importlib import resources
from pathlib import Path

import pytest
from fixtures.learner_scheme import TINY_CONFIG as CONFIG, tokenizer_folder
from fixtures.processes import memory_taken

from bitpress import CheckpointError, DataError
from bitpress.modeling import text_sources
from bitpress.modeling.tokens import load_calibration_data
from bitpress.planning.calibration_config import CalibrationConfig


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
def test_a_file_that_holds_no_texts_is_refused(
    model: Path, tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as refusal:
        load_calibration_data(CalibrationConfig(str(tmp_path / name)), model, CONFIG)
    assert len(str(refusal.value).splitlines()) == 1


def sparse(file: Path, begin: bytes, size: int) -> Path:
    """A file of that size, zeros after its beginning, that takes no room."""
    file.write_bytes(begin)
    os.truncate(file, size)
    return file


def test_a_line_of_a_gigabyte_is_refused_without_reading_it(model: Path, tmp_path: Path) -> None:
    file = sparse(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "', 1 << 30)
    with (
        memory_taken() as peak,
        pytest.raises(DataError, match=r"a\.jsonl, line 2: longer than 67,108,864 bytes"),
    ):
        load_calibration_data(CalibrationConfig(str(file)), model, CONFIG)
    assert peak[0] < 300e6


@pytest.mark.parametrize("seed", [0, 1], ids=["its beginning", "all of it"])
def test_a_gigabyte_of_nothing_fills_no_memory(model: Path, tmp_path: Path, seed: int) -> None:
    file = sparse(tmp_path / "a.txt", b"", 1 << 30)
    refused = pytest.raises(DataError, match=r"a\.txt: it holds more than 268,435,456 characters")
    with memory_taken() as peak, refused if seed else nullcontext():
        load_calibration_data(CalibrationConfig(str(file), 2, 32, seed), model, CONFIG)
    assert peak[0] < 900e6


def test_one_text_longer_than_is_wanted_is_tokenized_no_further(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "some words " * 1_000_000}))
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": "some words " * 100}))
    long, short = (
        load_calibration_data(
            CalibrationConfig(str(tmp_path / f"{name}.jsonl"), 2, 32), model, CONFIG
        )
        for name in ("long", "short")
    )
    assert long.digest == short.digest


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"nulls \0\0\0 and words " * 200),
        ("a.jsonl", b'{"text": "a \\u0000 null"}\n' * 200),
        ("a.jsonl", b'{"text": "twice", "text": "some words of it"}\n' * 200),
        ("a.txt", ("\u202e\u200d\ufeff\U000e0001 " * 800).encode()),
    ],
    ids=["nulls", "nulls in JSON", "a key twice", "signs that are not seen"],
)
def test_odd_text_is_text(model: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert load_calibration_data(
        CalibrationConfig(str(tmp_path / name), 2, 32), model, CONFIG
    ).input_ids.shape == (2, 32)


def test_any_bytes_are_texts_or_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    pieces = [
        b'{"text": "a b"}',
        b"\n",
        b"\xff",
        b"\0",
        b"{",
        b"[",
        b'"',
        b'{"messages": [{"role": 1}]}',
        b"9" * 5000,
        b"PAR1",
        b"NaN",
    ]
    for number in range(200):
        file = tmp_path / f"a{chance.choice(['.jsonl', '.txt', '.parquet', '.json'])}"
        file.write_bytes(b"".join(chance.choices(pieces, k=number % 12)))
        try:
            text_sources.read(str(file), 1000, lambda messages: str(messages))
        except DataError as e:
            message = str(e)
            assert len(message.splitlines()) == 1


def test_a_file_that_is_not_there_is_said_with_the_nearest_name(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").touch()
    with pytest.raises(DataError, match=r"there is no such file; did you mean 'texts.jsonl'\?"):
        load_calibration_data(CalibrationConfig(str(tmp_path / "text.jsonl")), model, CONFIG)


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [("pyarrow", "a.parquet", "parquet"), ("datasets", "a/name", "datasets")],
)
def test_a_missing_library_is_said_with_the_extra_that_brings_it(
    model: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, extra: str
) -> None:
    monkeypatch.chdir(model.parent)
    Path("a.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"bitpress-core\[{extra}\]"):
        load_calibration_data(CalibrationConfig(source), model, CONFIG)


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"sequence_length": 0}, {"seed": -1}, {"seed": 2**63}]
)
def test_numbers_that_cannot_be_are_refused(model: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="at least 1"):
        load_calibration_data(CalibrationConfig(**wrong), model, CONFIG)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_folder_without_a_usable_tokenizer_is_refused(model: Path, content: str | None) -> None:
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "tokenizer.json").unlink() if content is None else (
        model / "tokenizer.json"
    ).write_text(content)
    with pytest.raises(CheckpointError, match="no usable tokenizer") as refusal:
        load_calibration_data(CalibrationConfig(), model, CONFIG)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_tokenizer_of_another_model_is_refused(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"token id \d+ .* vocab_size is 1000"):
        load_calibration_data(CalibrationConfig(), model, {**CONFIG, "vocab_size": 1000})


def test_texts_that_ship_have_no_eight_words_in_common() -> None:
    folder = resources.files("bitpress.modeling")
    texts = {
        file.name: lzma.decompress(file.read_bytes()).decode()
        for file in folder.iterdir()
        if file.name.endswith(".xz")
    }
    assert len(texts["check.txt.xz"]) > 60_000
    runs = {
        name: {tuple(words[i : i + 8]) for i in range(len(words) - 7)}
        for name, words in ((name, text.lower().split()) for name, text in texts.items())
    }
    check = runs.pop("check.txt.xz")
    assert runs
    for name, others in runs.items():
        assert not check & others, name
