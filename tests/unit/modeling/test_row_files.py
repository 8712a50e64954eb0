"""Files and folders as people have them give the rows that are in them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitpress import DataError
from bitpress.modeling import text_sources

ROWS = [{"text": "One."}, {"text": "Two."}, {"text": "Three.\n"}]
OTHERS = [{"text": "Other."}]


def lines(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def array_on_a_line(folder: Path) -> str:
    (folder / "a.json").write_text(json.dumps(ROWS))
    return str(folder / "a.json")


def array_on_lines(folder: Path) -> str:
    (folder / "a.json").write_text("[" + ",\n".join(map(json.dumps, ROWS)) + "]\n")
    return str(folder / "a.json")


def indented_array(folder: Path) -> str:
    (folder / "a.json").write_text("\ufeff" + json.dumps(ROWS, indent=2))
    return str(folder / "a.json")


def indented_objects(folder: Path) -> str:
    (folder / "a.jsonl").write_text("\n\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n")
    return str(folder / "a.jsonl")


def folder_of_files(folder: Path) -> str:
    (folder / "c").mkdir()
    (folder / "a.txt").write_text("One.")
    lines(folder / "b.jsonl", ROWS[1:2])
    (folder / "c/a.txt").write_text("Three.\n")
    (folder / ".hidden.txt").write_text("Hidden.")
    (folder / "info.json").write_text("{}")
    (folder / "README.md").write_text("A description.")
    return str(folder)


def folder_of_splits(folder: Path) -> str:
    lines(folder / "train-1.jsonl", ROWS[:1])
    lines(folder / "train-2.jsonl", ROWS[1:])
    lines(folder / "test.jsonl", OTHERS)
    return str(folder)


def folder_with_its_split(folder: Path) -> str:
    lines(folder / "held-out.jsonl", ROWS)
    lines(folder / "train.jsonl", OTHERS)
    return f"{folder}[held-out]"


def save(folder: Path, rows: list[Any]) -> Path:
    """What `datasets.save_to_disk` writes."""
    pyarrow = pytest.importorskip("pyarrow")
    folder.mkdir(exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(str(folder / "data-0.arrow"), table.schema) as stream:
        stream.write_table(table)
    state = {"_data_files": [{"filename": "data-0.arrow"}], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def saved_dataset(folder: Path) -> str:
    return str(save(folder, ROWS))


def saved_splits(folder: Path) -> str:
    save(folder / "train", ROWS)
    save(folder / "test", OTHERS)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    return str(folder)


def saved_split_by_name(folder: Path) -> str:
    save(folder / "test", ROWS)
    save(folder / "train", OTHERS)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    return f"{folder}[test]"


def text_of(source: str) -> str:
    return text_sources.read(source, None, str).text


@pytest.mark.parametrize(
    "write",
    [
        array_on_a_line,
        array_on_lines,
        indented_array,
        indented_objects,
        folder_of_files,
        folder_of_splits,
        folder_with_its_split,
        saved_dataset,
        saved_splits,
        saved_split_by_name,
    ],
)
def test_rows_are_read_from_what_people_have(tmp_path: Path, write: Callable[[Path], str]) -> None:
    assert text_of(write(tmp_path)) == "One.\nTwo.\nThree.\n"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '[\n{"text": "a"},\n{"text": }\n]', "a.json, line 3: not valid JSON"),
        ("a.json", '[\n{"text": "a"},\n{"prompt": "b"}\n]', "a.json, object 2: an object"),
        ("state.json", "{}", "state.json: it is not as datasets.save_to_disk writes it"),
        ("dataset_dict.json", '{"splits": ["a", "b"]}', "no split 'train', but a, b"),
        ("a.md", "", "no file in it has texts"),
    ],
)
def test_what_cannot_be_read_is_said(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    (tmp_path / name).write_text(content)
    source = tmp_path / name if name == "a.json" else tmp_path
    with pytest.raises(DataError, match=expected):
        text_of(str(source))


def test_a_split_that_is_not_there_is_said(tmp_path: Path) -> None:
    file = lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match="no file in it is named after the split 'test'"):
        text_of(f"{tmp_path}[test]")
    with pytest.raises(DataError, match="a file has no splits"):
        text_of(f"{file}[test]")


def test_split_and_revision_of_a_dataset_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, **options: Any) -> list[dict[str, str]]:
        requests.append((name, subset, options["split"], options["revision"]))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for source in ("a/chats[train_sft]", "a/chats@v1.0:small[test]", "a/chats@0a1b"):
        text_of(source)
    assert requests == [
        ("a/chats", None, "train_sft", None),
        ("a/chats", "small", "test", "v1.0"),
        ("a/chats", None, "train", "0a1b"),
    ]
