"""The shapes in which people keep texts and chats as rows, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeGuard

from attrs import frozen

# Largest token id: vocabularies are smaller by far, and int64 holds it.
MAX_TOKEN_ID = 1 << 31

# What ShareGPT's "from" is called in a chat; any other name stays.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


@frozen
class Chat:
    """A chat.

    Attributes:
        messages: each with "role" and "content".
        text: what it is where the tokenizer has no chat template; None for chats that are nothing
            without one.
    """

    messages: list[Any]
    text: str | None = None


@frozen
class TokenIds:
    """A text that is tokens already."""

    ids: list[int]


Content: TypeAlias = str | Chat | TokenIds
Columns: TypeAlias = Mapping[str, Any]


def read_content(row: Any) -> Content | None:
    """What a row holds, by the first shape that fits; None if none does."""
    if not isinstance(row, Mapping):
        return None
    for read in SHAPES.values():
        if (content := read(row)) is not None:
            return content
    return None


def _read_text(row: Columns) -> Content | None:
    text = row.get("text")
    return text if isinstance(text, str) else None


def _read_messages(row: Columns) -> Content | None:
    messages = row.get("messages")
    return Chat(messages) if _is_chat(messages) else None


def _read_conversations(row: Columns) -> Content | None:
    messages = row.get("conversations")
    if _is_chat(messages):
        return Chat(messages)
    if not _is_list_with_key(messages, "from"):
        return None
    senders = [str(message["from"]) for message in messages]
    return Chat(
        [
            {"role": SHAREGPT_ROLES.get(sender, sender), "content": message.get("value")}
            for sender, message in zip(senders, messages, strict=True)
        ]
    )


def _read_completion(row: Columns) -> Content | None:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if _is_chat(prompt) and _is_chat(completion):
        return Chat([*prompt, *completion])
    return None


def _read_instruction(row: Columns) -> Content | None:
    instruction, context, answer = (row.get(key) for key in ("instruction", "input", "output"))
    if not isinstance(instruction, str) or not isinstance(answer, str):
        return None
    question = instruction
    if isinstance(context, str) and context:
        question += f"\n\n{context}"
    return _exchange(question, answer)


def _read_question(row: Columns) -> Content | None:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    return _exchange(question, answer)


def _read_token_ids(row: Columns) -> Content | None:
    ids = row.get("input_ids")
    if not isinstance(ids, list) or not ids:
        return None
    # bool is an int, and no token
    if not all(type(number) is int and 0 <= number < MAX_TOKEN_ID for number in ids):
        return None
    return TokenIds(ids)


# Columns of each shape, and what reads them. The first that fits counts: datasets keep a prompt
# beside the messages of a chat.
SHAPES: dict[tuple[str, ...], Callable[[Columns], Content | None]] = {
    ("text",): _read_text,
    ("messages",): _read_messages,
    ("conversations",): _read_conversations,
    ("prompt", "completion"): _read_completion,
    ("instruction", "output"): _read_instruction,
    ("question", "answer"): _read_question,
    ("input_ids",): _read_token_ids,
}

# Columns that a shape takes where they are there.
OPTIONAL_COLUMNS = ("input", "tools")


def find_columns(names: list[str]) -> list[str]:
    """Those columns of a table that texts are read from; none if no shape fits."""
    columns = [name for shape in SHAPES if set(shape) <= set(names) for name in shape]
    return columns and [*columns, *(name for name in OPTIONAL_COLUMNS if name in names)]


def describe_shapes() -> str:
    """The shapes by their columns, for messages."""
    return ", ".join("/".join(columns) for columns in SHAPES)


def _exchange(question: str, answer: str) -> Chat:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat(messages, f"{question}\n\n{answer}")


def _is_chat(messages: Any) -> TypeGuard[list[Any]]:
    return _is_list_with_key(messages, "role")


def _is_list_with_key(messages: Any, key: str) -> TypeGuard[list[Any]]:
    if not isinstance(messages, list) or not messages:
        return False
    return all(isinstance(message, Mapping) and key in message for message in messages)
