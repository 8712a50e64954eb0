"""Rows in the shapes that people have are texts, chats or tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures.learner_scheme import TINY_CONFIG as CONFIG, tokenizer_folder

from bitpress import DataError
from bitpress.modeling import row_files, text_sources
from bitpress.modeling.chat_templates import NoChatTemplateError
from bitpress.modeling.row_shapes import SHAPES
from bitpress.modeling.tokens import load_calibration_data
from bitpress.planning.calibration_config import CalibrationConfig

CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
RENDERED = "[user]Where?[assistant]There."
SHARED = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]
ROWS: list[tuple[dict[str, Any], str]] = [
    ({"text": "Where?"}, "Where?"),
    ({"text": None, "messages": CHAT}, RENDERED),
    ({"messages": CHAT, "prompt": "Where?", "completion": "There."}, RENDERED),
    ({"conversations": SHARED}, RENDERED),
    ({"conversations": CHAT}, RENDERED),
    ({"prompt": "Where? ", "completion": "There."}, "Where? There."),
    ({"prompt": CHAT[:1], "completion": CHAT[1:]}, RENDERED),
    ({"instruction": "Where?", "output": "There."}, RENDERED),
    ({"instruction": "Where?", "input": "", "output": "There."}, RENDERED),
    (
        {"instruction": "Where?", "input": "At sea.", "output": "There."},
        "[user]Where?\n\nAt sea.[assistant]There.",
    ),
    ({"question": "Where?", "answer": "There."}, RENDERED),
]


def render(messages: list[Any]) -> str:
    return "".join(f"[{message['role']}]{message['content']}" for message in messages)


def json_lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def parquet(file: Path, rows: list[Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([{"id": 1, **row} for row in rows])
    pytest.importorskip("pyarrow.parquet").write_table(table, file)
    return file


@pytest.mark.parametrize(("row", "text"), ROWS)
@pytest.mark.parametrize("write", [json_lines, parquet])
def test_a_row_of_a_shape_that_people_have_is_a_text(
    tmp_path: Path, row: dict[str, Any], text: str, write: Any
) -> None:
    file = write(tmp_path / {json_lines: "a.jsonl", parquet: "a.parquet"}[write], [row, row])
    assert text_sources.read(str(file), None, render).text == f"{text}\n{text}"


def test_every_shape_has_a_case() -> None:
    keys = [set(row) for row, _ in ROWS] + [{"input_ids"}]
    assert all(any(set(columns) <= names for names in keys) for columns in SHAPES)


@pytest.mark.parametrize(
    "row",
    [{"question": "Where?", "answer": "There."}, {"instruction": "Where?", "output": "There."}],
)
def test_a_question_with_its_answer_needs_no_chat_template(
    tmp_path: Path, row: dict[str, Any]
) -> None:
    def refuse(messages: list[Any]) -> str:
        raise NoChatTemplateError("none")

    file = json_lines(tmp_path / "a.jsonl", [row])
    assert text_sources.read(str(file), None, refuse).text == "Where?\n\nThere."


@pytest.mark.parametrize("write", [json_lines, parquet])
def test_tokens_are_used_as_they_are(tmp_path: Path, write: Any) -> None:
    rows = [list(range(start, start + 32)) for start in (100, 200, 300)]
    file = write(
        tmp_path / {json_lines: "a.jsonl", parquet: "a.parquet"}[write],
        [{"input_ids": row, "attention_mask": [1] * 32} for row in rows],
    )
    model = tokenizer_folder(tmp_path / "model")
    data = load_calibration_data(CalibrationConfig(str(file), 3, 32), model, CONFIG)
    assert data.input_ids.tolist() == rows
    assert data.prefix == ""


@pytest.mark.parametrize("ids", [[], ["a"], [-1], [2**40], [1.5], [True], 3])
def test_tokens_that_are_none_are_refused(tmp_path: Path, ids: Any) -> None:
    file = json_lines(tmp_path / "a.jsonl", [{"input_ids": ids}])
    with pytest.raises(DataError, match="line 1: an object"):
        text_sources.read(str(file), None, render)


def test_texts_and_tokens_in_one_file_are_refused(tmp_path: Path) -> None:
    file = json_lines(tmp_path / "a.jsonl", [{"text": "a"}, {"input_ids": [1]}])
    with pytest.raises(DataError, match="line 2: rows are texts or input_ids"):
        text_sources.read(str(file), None, render)


def test_more_tokens_than_are_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sources, "MAX_CHARACTERS", 7)
    monkeypatch.setattr(row_files, "MAX_CHARACTERS", 7)
    file = json_lines(tmp_path / "a.jsonl", [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9]}])
    with pytest.raises(DataError, match="line 1: it holds more than 7 characters or tokens"):
        text_sources.read(str(file), None, render)
