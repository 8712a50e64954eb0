"""The texts that ship with bitpress: prose, a mixture of prose, code, chats and languages, and one
to judge models on. TEXTS.md beside them says where they are from.
"""

from __future__ import annotations

import datetime
import json
import lzma
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from bitpress.errors import DataError
from bitpress.planning.evaluation_config import CHECK_TEXT

# What they are called in the manifest, by the names under which `--calibration` takes them.
DESCRIPTIONS: Mapping[str, str] = {
    "mixed": "the mixed text that ships with bitpress",
    "prose": "the text that ships with bitpress",
    CHECK_TEXT: "the check text that ships with bitpress",
}

# Those that are one text, and their files.
PLAIN = {"prose": "prose.txt.xz", CHECK_TEXT: "check.txt.xz"}

# What chat templates take for today in a bundled chat, so that the same command makes the same
# files on any day: the one that Llama 3 templates write where they are given none.
DAY = datetime.date(2024, 7, 26)


def choose_default(has_chat_template: bool) -> str:
    """The one that a model is calibrated on where the user names none.

    A model that chats has seen code, languages and its own template, and is served with them. One
    without a template reads a chat as any other text.
    """
    return "mixed" if has_chat_template else "prose"


def is_bundled(source: object) -> bool:
    """Whether a source is one of them; a file or a folder of that name is not."""
    return isinstance(source, str) and source in DESCRIPTIONS and not Path(source).exists()


def read_rows(name: str) -> Iterator[Mapping[str, Any]]:
    """Rows with a "text" or with "messages", as files hold them.

    Raises:
        DataError: the file is not as it was installed.
    """
    if name in PLAIN:
        yield {"text": _unpack(PLAIN[name])}
        return
    for line in _unpack("mixed.jsonl.xz").splitlines():
        yield json.loads(line)


def _unpack(file_name: str) -> str:
    packed = resources.files("bitpress.modeling").joinpath(file_name).read_bytes()
    try:
        return lzma.decompress(packed).decode()
    except lzma.LZMAError as e:
        raise DataError(
            f"{file_name}: the text that ships with bitpress is damaged ({e}); install "
            "bitpress-core again"
        ) from None


def join_messages(messages: list[Any]) -> str:
    """A bundled chat as a text, where no template takes it."""
    return "\n\n".join(message["content"] for message in messages)
