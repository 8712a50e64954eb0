"""Where texts come from: files of several kinds, a dataset's name, or what ships with bitpress."""

from __future__ import annotations

import json
import lzma
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from attrs import frozen

from bitpress.errors import DataError, did_you_mean, first_line
from bitpress.modeling import row_shapes
from bitpress.modeling.chat_templates import (
    NoChatTemplateError,
    RefusedChatError,
    SkippedChatError,
)
from bitpress.modeling.row_shapes import Chat, TokenIds

# What the source is called where the user names none.
DEFAULT_SOURCE = "the text that ships with bitpress"

JSON_LINES = (".jsonl", ".ndjson", ".json")

# Bytes of a line of a JSON lines file.
MAX_LINE_BYTES = 1 << 26

# Characters of all texts together; as tokens they take several times the memory.
MAX_CHARACTERS = 1 << 28

SUFFIXES = (*JSON_LINES, ".txt", ".parquet")

# Where a row stands, for messages ("texts.jsonl, line 3"), and the row.
Row: TypeAlias = tuple[str, Any]

# Makes one text of the messages of a chat, and of its tools where it has any (`tools=`).
RenderChat: TypeAlias = Callable[..., str]

# Chats that are left out and named one by one.
MAX_NAMED_CHATS = 3

# Chats that a template refuses where it has taken none, before no more are tried.
MAX_REFUSED_CHATS = 100


@frozen
class Texts:
    """What a source holds.

    Attributes:
        text: its texts, joined by single newlines.
        source: what to call it.
        warnings: what the user should know, such as which chats were left out.
        input_ids: where rows hold tokens and no text, all of them in order.
    """

    text: str
    source: str
    warnings: tuple[str, ...] = ()
    input_ids: array[int] | None = None


def read(source: str | None, max_characters: int | None, render: RenderChat) -> Texts:
    """The texts of a source.

    Args:
        source: a file, or the name of a dataset; None: the text that ships with bitpress.
        max_characters: no more is read; None reads all.

    Raises:
        DataError: there is no such source, or its texts cannot be read.
    """
    if source is None:
        packed = resources.files("bitpress.modeling").joinpath("default.txt.xz").read_bytes()
        return Texts(lzma.decompress(packed).decode()[:max_characters], DEFAULT_SOURCE)
    file = Path(source)
    try:
        if not file.is_file():
            texts = _join(source, _dataset_rows(source), max_characters, render)
        elif file.suffix.lower() == ".txt":
            texts = Texts(_read_plain(file, max_characters), file.name)
        else:
            texts = _join(file.name, _file_rows(file), max_characters, render)
    except OSError as e:
        raise DataError(f"{source}: {e.strerror or first_line(e)}") from None
    if not texts.text.strip() and not texts.input_ids:
        raise DataError("; ".join((f"{source}: it holds no text", *texts.warnings)))
    return texts


def _read_plain(file: Path, max_characters: int | None) -> str:
    # one more than is taken shows that there is too much
    limit = min(max_characters or MAX_CHARACTERS + 1, MAX_CHARACTERS + 1)
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(limit)
    except UnicodeDecodeError as e:
        raise DataError(f"{file}: it is not UTF-8 text ({e.reason}); save it as UTF-8") from None
    _check_size(text, str(file))
    return text


def _check_size(text: str, position: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise DataError(
            f"{position}: it holds more than {MAX_CHARACTERS:,} characters, which are to be read "
            "whole; give a part of it"
        )


def _file_rows(file: Path) -> Iterator[Row]:
    suffix = file.suffix.lower()
    if suffix in JSON_LINES:
        return _json_lines_rows(file)
    if suffix == ".parquet":
        return _parquet_rows(file)
    raise DataError(
        f"{file}: texts are read from {', '.join(SUFFIXES)}; if it is plain text, name it .txt"
    )


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
                yield position, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{position}: it is not UTF-8 text ({e.reason}); save the file as UTF-8"
                ) from None
            except (ValueError, RecursionError) as e:
                raise DataError(
                    f"{position}: not valid JSON ({e}); every line is one object"
                ) from None


def _parquet_rows(file: Path) -> Iterator[Row]:
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
            columns = row_shapes.find_columns(names)
            if not columns:
                raise DataError(
                    f"{file}: it has no column text or messages, but {', '.join(names) or 'none'}; "
                    f"all shapes: {row_shapes.describe_shapes()}"
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, ValueError) as e:
        raise DataError(f"{file}: it cannot be read as parquet ({first_line(e)})") from None


def _dataset_rows(source: str) -> Iterator[Row]:
    file = Path(source)
    if file.suffix.lower() in SUFFIXES or file.is_absolute():
        siblings = [f.name for f in file.parent.iterdir()] if file.parent.is_dir() else []
        raise DataError(f"{source}: there is no such file{did_you_mean(file.name, siblings)}")
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


def _join(
    source: str, rows: Iterable[Row], max_characters: int | None, render: RenderChat
) -> Texts:
    texts: list[str] = []
    input_ids = array("q")
    skipped: list[str] = []
    refusal: str | None = None
    # a newline less than there are texts
    num_characters, position = -1, ""
    limit = MAX_CHARACTERS + 1 if max_characters is None else max_characters
    for position, row in rows:
        try:
            content = _extract_text(position, row, render)
        except (SkippedChatError, RefusedChatError) as e:
            skipped.append(f"{position}: the chat is left out: {e}")
            if isinstance(e, RefusedChatError):
                refusal = refusal or f"{position}: {e}"
            if not texts and len(skipped) >= MAX_REFUSED_CHATS:
                break
            continue
        if isinstance(content, TokenIds):
            input_ids.extend(content.ids)
            num_characters += len(content.ids)
        else:
            texts.append(content)
            num_characters += len(content) + 1
        if texts and input_ids:
            raise DataError(f"{position}: rows are texts or input_ids, not both in one file")
        if num_characters >= limit:
            break
    if refusal and not texts and not input_ids:
        others = f"; all of the first {len(skipped)} chats are refused" if skipped[1:] else ""
        raise DataError(refusal + others)
    text = "\n".join(texts)
    _check_size(text, position)
    warnings = skipped[:MAX_NAMED_CHATS]
    if len(skipped) > MAX_NAMED_CHATS:
        warnings.append(f"{source}: {len(skipped) - MAX_NAMED_CHATS} more chats are left out")
    return Texts(text[:max_characters], source, tuple(warnings), input_ids or None)


def _extract_text(position: str, row: Any, render: RenderChat) -> str | TokenIds:
    """The text of a row, its chat as a text, or its tokens."""
    content = row_shapes.read_content(row)
    if isinstance(content, TokenIds):
        return content
    if isinstance(content, Chat):
        content = _render_chat(position, content, row.get("tools"), render)
    if content is None:
        row = row if isinstance(row, Mapping) else {}
        keys = ", ".join(repr(str(key)[:40]) for key in list(row)[:10])
        instead = f", not one with {keys}" if row else ""
        raise DataError(
            f'{position}: an object with a "text" or with chat "messages" (each with "role" '
            f'and "content") is expected{instead}; all shapes: {row_shapes.describe_shapes()}'
        )
    try:
        content.encode()
    except UnicodeEncodeError as e:
        raise DataError(
            f"{position}: half of a surrogate pair, which is no character, at {e.start}"
        ) from None
    return content


def _render_chat(position: str, chat: Chat, tools: Any, render: RenderChat) -> str:
    checked_tools = _read_tools(position, tools)
    try:
        return render(chat.messages, **({"tools": checked_tools} if checked_tools else {}))
    except RefusedChatError:
        raise
    except DataError as e:
        if chat.text is not None and isinstance(e, NoChatTemplateError):
            return chat.text
        raise DataError(f"{position}: {e}") from None


def _read_tools(position: str, tools: Any) -> list[Any] | None:
    """The tools of a chat, which some datasets hold as JSON in a string."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            tools = {}
    if not tools and not isinstance(tools, Mapping):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f'{position}: "tools" are a list of objects, or such a list as JSON')
    return tools
