"""Where texts come from: files of several kinds, a dataset's name, or what ships with bitpress."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from bitpress.errors import DataError, did_you_mean, first_line

SHIPPED = "the text that ships with bitpress"

JSON_LINES = (".jsonl", ".ndjson", ".json")

# bytes of a line of a JSON lines file
LARGEST = 1 << 26

# characters of all texts together; as tokens they take several times the memory
LONGEST = 1 << 28

SUFFIXES = (*JSON_LINES, ".txt", ".parquet")

# what errors call it ("texts.jsonl, line 3"), and the row
Row: TypeAlias = tuple[str, Any]

# the messages of a chat as one text
Render: TypeAlias = Callable[[list[Any]], str]


def read(source: str | None, limit: int | None, render: Render) -> tuple[str, str]:
    """The texts of a source joined by single newlines, and what to call the source.

    With a limit it is read no further than to that many characters.

    Raises:
        DataError: there is no such source, or its texts cannot be read.
    """
    if source is None:
        packed = resources.files("bitpress.modeling").joinpath("default.txt.xz").read_bytes()
        return lzma.decompress(packed).decode()[:limit], SHIPPED
    file = Path(source)
    try:
        if not file.is_file():
            name, text = source, _join(_dataset(source), limit, render)
        elif file.suffix.lower() == ".txt":
            name, text = file.name, _plain(file, limit)
        else:
            name, text = file.name, _join(_rows(file), limit, render)
    except OSError as e:
        raise DataError(f"{source}: {e.strerror or first_line(e)}") from None
    if not text.strip():
        raise DataError(f"{source}: it holds no text")
    return text, name


def _plain(file: Path, limit: int | None) -> str:
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(min(limit or LONGEST + 1, LONGEST + 1))
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: it is not UTF-8 text ({e.reason}); save it as UTF-8") from None
    return _bounded(text, str(file))


def _bounded(text: str, place: str) -> str:
    if len(text) > LONGEST:
        raise DataError(
            f"{place}: it holds more than {LONGEST:,} characters, which are to be read whole; give "
            "a part of it"
        )
    return text


def _rows(file: Path) -> Iterator[Row]:
    suffix = file.suffix.lower()
    if suffix in JSON_LINES:
        return _json_lines(file)
    if suffix == ".parquet":
        return _parquet(file)
    raise DataError(
        f"{file}: texts are read from {', '.join(SUFFIXES)}; if it is plain text, name it .txt"
    )


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LARGEST + 1), b""), 1):
            place = f"{file}, line {number}"
            if len(line) > LARGEST:
                raise DataError(f"{place}: longer than {LARGEST:,} bytes; every line is one object")
            if not line.strip():
                continue
            try:
                yield place, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{place}: it is not UTF-8 text ({e.reason}); save the file as UTF-8"
                ) from None
            except (ValueError, RecursionError) as e:
                raise DataError(
                    f"{place}: not valid JSON ({e}); every line is one object"
                ) from None


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{file}: reading parquet needs pyarrow; pip install 'bitpress-core[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            column = next((name for name in ("text", "messages") if name in names), None)
            if column is None:
                raise DataError(
                    f"{file}: it has no column text or messages, but {', '.join(names) or 'none'}"
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, ValueError) as e:
        raise DataError(f"{file}: it cannot be read as parquet ({first_line(e)})") from None


def _dataset(source: str) -> Iterator[Row]:
    file = Path(source)
    if file.suffix.lower() in SUFFIXES or file.is_absolute():
        beside = [f.name for f in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"{source}: there is no such file{did_you_mean(file.name, beside)}")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: there is no such file; if it is the name of a dataset, pip install "
            "'bitpress-core[datasets]' for those"
        ) from None
    name, _, subset = source.partition(":")
    try:
        # streamed: of a large dataset only what is used is fetched
        rows = datasets.load_dataset(name, subset or None, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{source}, row {number}", row
    except Exception as e:
        # the library and the network behind it raise many kinds
        raise DataError(
            f"{source}: it is neither a file nor a dataset that can be loaded ({first_line(e)})"
        ) from None


def _join(rows: Iterable[Row], limit: int | None, render: Render) -> str:
    texts: list[str] = []
    # a newline less than there are texts
    size, place = -1, ""
    for place, row in rows:
        texts.append(_text(place, row, render))
        size += len(texts[-1]) + 1
        if size >= (LONGEST + 1 if limit is None else limit):
            break
    return _bounded("\n".join(texts), place)[:limit]


def _text(place: str, row: Any, render: Render) -> str:
    """The text of a row, or its chat as a text."""
    row = row if isinstance(row, Mapping) else {}
    text, messages = row.get("text"), row.get("messages")
    if not isinstance(text, str):
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(m, Mapping) and "role" in m for m in messages)
        ):
            raise DataError(
                f'{place}: an object with a "text" or with chat "messages" (each with "role" and '
                '"content") is expected'
                + (
                    f", not one with {', '.join(repr(str(key)[:40]) for key in list(row)[:10])}"
                    if row
                    else ""
                )
            )
        try:
            text = render(messages)
        except DataError as e:
            raise DataError(f"{place}: {e}") from None
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f"{place}: half of a surrogate pair, which is no character, at {e.start}"
        ) from None
    return text
