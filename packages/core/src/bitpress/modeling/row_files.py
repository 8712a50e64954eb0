"""Rows of files and folders: JSON in lines or whole, parquet, and what `datasets` has saved."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from bitpress.errors import DataError, first_line
from bitpress.modeling import row_shapes

JSON_LINES = (".jsonl", ".ndjson", ".json")

# Bytes of a line of a JSON lines file, and of a JSON file that is one document.
MAX_LINE_BYTES, MAX_DOCUMENT_BYTES = 1 << 26, 1 << 28

# Characters of all texts together; as tokens they take several times the memory.
MAX_CHARACTERS = 1 << 28

SUFFIXES = (*JSON_LINES, ".txt", ".parquet")

# Of a dataset or a folder, where the user names none.
DEFAULT_SPLIT = "train"

# What `save_to_disk` of `datasets` writes beside the data: of a dataset, and of one with splits.
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"

WHITE_SPACE = re.compile(r"\s+")

# Where a row stands, for messages ("texts.jsonl, line 3"), and the row.
Row: TypeAlias = tuple[str, Any]


def read_plain(file: Path, max_characters: int | None) -> str:
    """The beginning of a text file, or all of it.

    Raises:
        DataError: it is not UTF-8, or too long to be read whole.
    """
    # one more than is taken shows that there is too much
    limit = min(max_characters or MAX_CHARACTERS + 1, MAX_CHARACTERS + 1)
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(limit)
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: it is not UTF-8 text ({e.reason}); save it as UTF-8") from None
    check_size(len(text), str(file))
    return text


def check_size(size: int, position: str) -> None:
    """Raise DataError where there are more characters or tokens than are read."""
    if size > MAX_CHARACTERS:
        raise DataError(
            f"{position}: it holds more than {MAX_CHARACTERS:,} characters or tokens, which are "
            "to be read whole; give a part of it"
        )


def file_rows(file: Path) -> Iterator[Row]:
    """The rows of a file, by its suffix."""
    suffix = file.suffix.lower()
    if suffix in JSON_LINES:
        return _json_rows(file)
    if suffix == ".parquet":
        return _parquet_rows(file)
    raise DataError(
        f"{file}: texts are read from {', '.join(SUFFIXES)}; if it is plain text, name it .txt"
    )


def folder_rows(folder: Path, split: str | None, max_characters: int | None) -> Iterator[Row]:
    """The rows of all files of a folder in the order of their names, or of one that
    `datasets.save_to_disk` has written.

    Args:
        split: only files in whose name it is; None: "train", if some are named so.
    """
    if (folder / SAVED_SPLITS).is_file():
        names = _read_json(folder / SAVED_SPLITS, "splits")
        saved_split = split or (names[0] if len(names) == 1 else DEFAULT_SPLIT)
        if saved_split not in names:
            raise DataError(f"{folder}: no split {saved_split!r}, but {', '.join(map(str, names))}")
        folder /= saved_split
    if (folder / SAVED_DATASET).is_file():
        for record in _read_json(folder / SAVED_DATASET, "_data_files"):
            # a name and no path: what lies in the folder, and nothing else
            yield from _arrow_rows(folder / Path(str(record["filename"])).name)
        return
    for file in _find_files(folder, split):
        if file.suffix.lower() == ".txt":
            yield str(file), {"text": read_plain(file, max_characters)}
        else:
            yield from file_rows(file)


def _find_files(folder: Path, split: str | None) -> list[Path]:
    hidden = re.compile(r"(^|/)\.")
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = [
        folder / name
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not hidden.search(name)
    ]
    # what stands beside data are descriptions
    if any(file.suffix.lower() != ".json" for file in files):
        files = [file for file in files if file.suffix.lower() != ".json"]
    of_split = [file for file in files if (split or DEFAULT_SPLIT) in file.name]
    if split and not of_split:
        raise DataError(f"{folder}: no file in it is named after the split {split!r}")
    if not files:
        raise DataError(f"{folder}: no file in it has texts ({', '.join(SUFFIXES)})")
    return of_split or files


def _read_json(file: Path, key: str) -> list[Any]:
    """A list that `datasets` has written."""
    try:
        values = json.loads(file.read_bytes())[key]
    except (ValueError, RecursionError, KeyError, TypeError):
        values = None
    if not isinstance(values, list):
        raise DataError(f"{file}: it is not as datasets.save_to_disk writes it")
    return values


def _json_rows(file: Path) -> Iterator[Row]:
    return _json_document_rows(file) if _is_document(file) else _json_lines_rows(file)


def _is_document(file: Path) -> bool:
    """Whether the first line of a JSON file only begins a value."""
    with file.open("rb") as opened:
        line = b""
        while not line.strip():
            line = opened.readline(MAX_LINE_BYTES + 1)
            if not line or len(line) > MAX_LINE_BYTES:
                return False
    try:
        json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError:
        return line.endswith(b"\n")
    except (ValueError, RecursionError):
        return False
    return False


def _json_document_rows(file: Path) -> Iterator[Row]:
    """The items of JSON lists, or objects one after another, over any number of lines."""
    if file.stat().st_size > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{file}: one JSON document of more than {MAX_DOCUMENT_BYTES:,} bytes; write one "
            "object a line"
        )
    decoder, number, position = json.JSONDecoder(), 0, 0
    try:
        text = file.read_bytes().decode("utf-8-sig").strip()
        while position < len(text):
            value, position = decoder.raw_decode(text, position)
            for row in _unroll(value):
                number += 1
                yield f"{file}, object {number}", row
            # raw_decode takes no white space before a value
            if space := WHITE_SPACE.match(text, position):
                position = space.end()
    except json.JSONDecodeError as e:
        raise DataError(f"{file}, line {e.lineno}: not valid JSON ({e.msg})") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{file}: not valid JSON ({first_line(e)})") from None


def _unroll(value: Any) -> Iterable[Any]:
    """The items of a list of objects; anything else is a row itself."""
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        return value
    return [value]


def _json_lines_rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as opened:
        lines = iter(lambda: opened.readline(MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            position = f"{file}, line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{position}: longer than {MAX_LINE_BYTES:,} bytes; every line is one object"
                )
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{position}: it is not UTF-8 text ({e.reason}); save the file as UTF-8"
                ) from None
            except (ValueError, RecursionError) as e:
                raise DataError(
                    f"{position}: not valid JSON ({e}); every line is one object"
                ) from None
            for row in _unroll(value):
                yield position, row


def _parquet_rows(file: Path) -> Iterator[Row]:
    pyarrow = _import_pyarrow(file)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = _find_columns(file, table.schema_arrow.names)
            batches = table.iter_batches(batch_size=1024, columns=columns)
            yield from _batch_rows(file, batches)
    except (pyarrow.ArrowException, ValueError) as e:
        raise DataError(f"{file}: it cannot be read as parquet ({first_line(e)})") from None


def _arrow_rows(file: Path) -> Iterator[Row]:
    pyarrow = _import_pyarrow(file)
    try:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as table:
            columns = _find_columns(file, table.schema.names)
            yield from _batch_rows(file, (batch.select(columns) for batch in table))
    except (pyarrow.ArrowException, ValueError) as e:
        raise DataError(f"{file}: it cannot be read as arrow ({first_line(e)})") from None


def _import_pyarrow(file: Path) -> Any:
    try:
        pyarrow = importlib.import_module("pyarrow")
        for name in ("ipc", "parquet"):
            importlib.import_module(f"pyarrow.{name}")
    except ImportError:
        raise DataError(
            f"{file}: reading {file.suffix[1:]} needs pyarrow; pip install 'bitpress-core[parquet]'"
        ) from None
    return pyarrow


def _find_columns(file: Path, names: list[str]) -> list[str]:
    columns = row_shapes.find_columns(names)
    if not columns:
        raise DataError(
            f"{file}: it has no column text or messages, but {', '.join(names) or 'none'}; "
            f"all shapes: {row_shapes.describe_shapes()}"
        )
    return columns


def _batch_rows(file: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{file}, row {number}", row
