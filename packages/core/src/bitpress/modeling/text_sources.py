"""Where texts come from: files of several kinds, a dataset's name, or what ships with bitpress."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from attrs import evolve, frozen

from bitpress.checkpoint.hub import split_revision
from bitpress.errors import DataError, did_you_mean, first_line
from bitpress.modeling import bundled_texts, row_shapes
from bitpress.modeling.chat_templates import (
    NoChatTemplateError,
    RefusedChatError,
    SkippedChatError,
)
from bitpress.modeling.row_files import (
    DEFAULT_SPLIT,
    MAX_CHARACTERS,
    SUFFIXES,
    Row,
    check_size,
    file_rows,
    folder_rows,
    read_plain,
)
from bitpress.modeling.row_shapes import Chat, TokenIds

# What the source is called where texts are given themselves.
GIVEN_SOURCE = "a list of texts"

# A dataset or a folder, and the split of it: NAME[train_sft].
SPLIT = re.compile(r"(.+)\[([\w.-]+)\]")

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


def read(
    source: str | tuple[str | Mapping[str, Any], ...] | None,
    max_characters: int | None,
    render: RenderChat,
) -> Texts:
    """The texts of a source.

    Args:
        source: a file, a folder, the name of a dataset, perhaps with a split in brackets, or of a
            text that ships with bitpress; None: prose. Or texts themselves, or rows as
            files hold them.
        max_characters: no more is read; None reads all.

    Raises:
        DataError: there is no such source, or its texts cannot be read.
    """
    if source is None or bundled_texts.is_bundled(source):
        return _read_bundled(str(source or "prose"), max_characters, render)
    if isinstance(source, tuple):
        texts = _join(GIVEN_SOURCE, _number_rows(source), max_characters, render)
        return _require_text(GIVEN_SOURCE, texts)
    name, split = _parse_split(source)
    file = Path(name)
    try:
        if file.is_dir():
            rows = folder_rows(file, split, max_characters)
            texts = _join(file.resolve().name, rows, max_characters, render)
        elif file.is_file() and split:
            raise DataError(f"{source}: a file has no splits; name the file alone")
        elif not file.is_file():
            texts = _join(source, _dataset_rows(name, split), max_characters, render)
        elif file.suffix.lower() == ".txt":
            texts = Texts(read_plain(file, max_characters), file.name)
        else:
            texts = _join(file.name, file_rows(file), max_characters, render)
    except OSError as e:
        raise DataError(f"{source}: {e.strerror or first_line(e)}") from None
    # what a run warns of is recorded, and where files lie is nobody's business
    warnings = tuple(text.replace(str(file), file.resolve().name) for text in texts.warnings)
    return _require_text(source, evolve(texts, warnings=warnings))


def _read_bundled(name: str, max_characters: int | None, render: RenderChat) -> Texts:
    def render_or_join(messages: list[Any]) -> str:
        try:
            return render(messages)
        except (DataError, SkippedChatError):
            # nobody chose these chats, and a run shall not fail at them
            return bundled_texts.join_messages(messages)

    rows = ((name, row) for row in bundled_texts.read_rows(name))
    return _join(bundled_texts.DESCRIPTIONS[name], rows, max_characters, render_or_join)


def _number_rows(rows: tuple[str | Mapping[str, Any], ...]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        yield f"text {number} of the list", {"text": row} if isinstance(row, str) else row


def _require_text(source: str, texts: Texts) -> Texts:
    if not texts.text.strip() and not texts.input_ids:
        raise DataError("; ".join((f"{source}: it holds no text", *texts.warnings)))
    return texts


def _parse_split(source: str) -> tuple[str, str | None]:
    """The name of a source, and of its split where it is given."""
    match = SPLIT.fullmatch(source)
    return (source, None) if match is None or Path(source).exists() else (match[1], match[2])


def _dataset_rows(source: str, split: str | None) -> Iterator[Row]:
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
    name, revision = split_revision(name)
    try:
        # streamed: of a large dataset only what is used is fetched
        rows = datasets.load_dataset(
            name,
            subset or None,
            split=split or DEFAULT_SPLIT,
            revision=revision,
            streaming=True,
        )
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
    check_size(max(len(text), len(input_ids)), position)
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
