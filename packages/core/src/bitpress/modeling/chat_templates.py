"""Chats become texts through the model's chat template, which is a stranger's program. It runs in a
process of its own, with a limit of time and one of memory.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import IO, Any

from bitpress.errors import MAX_LINE_LENGTH, DataError, first_line

# Seconds of CPU time for one chat: templates of published models take milliseconds, and a long chat
# a tenth of a second.
MAX_SECONDS = 10

# Chats that reach that limit, before no more are tried.
MAX_ENDLESS_CHATS = 3

# Seconds in which the process must have answered, on whatever busy machine: it imports a part of
# transformers first, which takes one or two.
PATIENCE = 300.0

# Memory and characters that one chat may take, and for each byte of it.
MAX_BYTES, MAX_CHARACTERS = 1 << 29, 1 << 20
BYTES_PER_BYTE, CHARACTERS_PER_BYTE = 32, 8

# What transformers gives templates that write the date.
DATE_FUNCTION = "strftime_now"

# What the process answers with, before a text: it is ready; a rendered chat; what the template
# complains about; why the chat is left out.
READY, RENDERED, REFUSED, SKIPPED = b"0", b"1", b"2", b"3"

# Of an answer: its kind, and how many bytes follow.
HEAD_BYTES = 9


class SkippedChatError(Exception):
    """A chat that is left out, since rendering it would take too much; its text says of what."""


class NoChatTemplateError(DataError):
    """A tokenizer has no chat template."""


class RefusedChatError(DataError):
    """A chat that the model's chat template does not take."""


class ChatRenderer:
    """Renders chats as a tokenizer's `apply_chat_template` does; use it in `with`.

    Attributes:
        writes_date: whether a chat was rendered by a template that asks for the day, and was told
            today's.
    """

    def __init__(self, tokenizer: Any, day: datetime.date | None = None) -> None:
        """Take a tokenizer.

        Args:
            day: what templates take for today; None: the day it is.
        """
        self._tokenizer = tokenizer
        self._day = day
        self.writes_date = False
        self._process: subprocess.Popen[bytes] | None = None
        self._num_endless = 0

    def __enter__(self) -> ChatRenderer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def render(self, messages: list[Any], tools: list[Any] | None = None) -> str:
        """The text of a chat.

        Args:
            messages: contents that are lists of text parts become text where the template takes
                text alone.
            tools: descriptions of functions, as JSON schemas.

        Raises:
            DataError: the template does not end.
            NoChatTemplateError: there is none.
            RefusedChatError: the template does not take these messages.
            SkippedChatError: it would take too much.
        """
        joined = [_join_parts(message) for message in messages]
        if joined == messages:
            return self._render(messages, tools)
        try:
            text = self._render(messages, tools)
        except RefusedChatError:
            return self._render(joined, tools)
        return text if _shows_parts(text, messages) else self._render(joined, tools)

    def _render(self, messages: list[Any], tools: list[Any] | None) -> str:
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            raise NoChatTemplateError(
                "a chat, and the model's tokenizer has no chat template; give it as one text"
            )
        try:
            if _is_own_method(tokenizer):
                # Not a template, but code that is installed, or that the user trusts.
                return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
            template = tokenizer.get_chat_template(tools=tools)
            names = dict(_special_tokens(tokenizer))
            self.writes_date |= self._day is None and DATE_FUNCTION in template
        except Exception as e:
            raise _refusal(first_line(e)) from None
        if self._num_endless >= MAX_ENDLESS_CHATS:
            raise DataError(
                f"the tokenizer's chat template did not end on {self._num_endless} chats; give "
                "them as texts"
            )
        request = (template, names, messages, tools, self._day, MAX_SECONDS)
        kind, text = self._ask(pickle.dumps(request))
        if kind == REFUSED:
            raise _refusal(text)
        if kind == SKIPPED:
            raise SkippedChatError(text)
        return text

    def _ask(self, request: bytes) -> tuple[bytes, str]:
        """What the process answers."""
        if self._process is None:
            self._process = _start()
        process = self._process
        try:
            _send(process.stdin, request)
            max_bytes = 4 * (MAX_CHARACTERS + CHARACTERS_PER_BYTE * len(request))
            return _receive(process.stdout, max_bytes)
        except (EOFError, BrokenPipeError, TimeoutError):
            self._stop()
        except BaseException:
            self._stop()
            raise
        if process.returncode == -signal.SIGXCPU:
            self._num_endless += 1
            return SKIPPED, f"it takes more than {MAX_SECONDS} s"
        return SKIPPED, "its process was ended"

    def _stop(self) -> None:
        if self._process is not None:
            # It may have ended by itself, and then its own exit code stays.
            self._process.kill()
            self._process.communicate()
            self._process = None


def _join_parts(message: Any) -> Any:
    """A message whose content is text where it was a list of text parts."""
    content = message.get("content")
    if not isinstance(content, list) or not content:
        return message
    texts = [part.get("text") if _is_text_part(part) else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        return message
    return {**message, "content": "\n".join(map(str, texts))}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text"


def _shows_parts(text: str, messages: list[Any]) -> bool:
    """Whether a template has written the texts of parts, and not the parts as Python shows them."""
    contents = [message.get("content") for message in messages]
    part_lists = [content for content in contents if isinstance(content, list)]
    if any(str(content) in text for content in part_lists):
        return False
    parts = [part for content in part_lists for part in content if _is_text_part(part)]
    return all(str(part.get("text")).strip() in text for part in parts)


def _is_own_method(tokenizer: Any) -> bool:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    method = PreTrainedTokenizerBase.apply_chat_template
    return getattr(type(tokenizer), "apply_chat_template", None) is not method


def _special_tokens(tokenizer: Any) -> Iterator[tuple[str, Any]]:
    """The tokens that a template sees by name."""
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, (list, tuple)):
            yield name, [str(each) for each in token]
        else:
            yield name, str(token)


def _refusal(fact: str) -> RefusedChatError:
    # Templates are programs, and raise what they like.
    return RefusedChatError(f"the tokenizer's chat template does not take these messages ({fact})")


def _start() -> subprocess.Popen[bytes]:
    """The process, ready. It is no fork, which would wait for ever for torch's threads."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        _receive(process.stdout, 0)
    except (EOFError, TimeoutError):
        process.kill()
        process.communicate()
        raise DataError("no process can be started to render chats in") from None
    except BaseException:
        process.kill()
        raise
    return process


def _send(pipe: IO[bytes] | None, message: bytes) -> None:
    assert pipe is not None
    pipe.write(len(message).to_bytes(8, "little") + message)
    pipe.flush()


def _receive(pipe: IO[bytes] | None, max_bytes: int) -> tuple[bytes, str]:
    """An answer of the process: only text, which no template could make anything else of."""
    assert pipe is not None
    deadline = time.monotonic() + PATIENCE
    head = _read(pipe, HEAD_BYTES, deadline)
    length = int.from_bytes(head[1:], "little")
    if length > max_bytes:
        raise EOFError
    return head[:1], _read(pipe, length, deadline).decode(errors="surrogatepass")


def _read(pipe: IO[bytes], num_bytes: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            raise TimeoutError
        chunk = os.read(pipe.fileno(), min(num_bytes - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def serve() -> None:
    """In the process: render chats until standard input ends."""
    # Whoever prints may not disturb the answers.
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    _answer(answers, READY)
    while head := requests.read(8):
        request = requests.read(int.from_bytes(head, "little"))
        template, names, messages, tools, day, max_seconds = pickle.loads(request)
        if day is not None:
            _stop_clock(day)
        tokenizer = SimpleNamespace(
            get_chat_template=lambda *_, text=template: text, special_tokens_map=names
        )
        _limit_resources(len(request), max_seconds)
        try:
            text = PreTrainedTokenizerBase.apply_chat_template(
                tokenizer, messages, tools=tools, tokenize=False
            )
            assert isinstance(text, str)
            if len(text) > MAX_CHARACTERS + CHARACTERS_PER_BYTE * len(request):
                kind, text = SKIPPED, f"its text has {len(text):,} characters"
            else:
                kind = RENDERED
        except MemoryError:
            kind, text = SKIPPED, "it takes too much memory"
        except Exception as e:
            kind, text = REFUSED, first_line(e)[:MAX_LINE_LENGTH]
        _answer(answers, kind, text)


def _stop_clock(day: datetime.date) -> None:
    """Let templates be told that day as today's, in this process alone. They get their function
    from a module of transformers, which takes no other in its place.
    """
    module = importlib.import_module("transformers.utils.chat_template_utils")
    noon = datetime.datetime.combine(day, datetime.time(12))
    if hasattr(module, "datetime"):
        vars(module)["datetime"] = SimpleNamespace(now=lambda: noon)


def _limit_resources(num_bytes: int, max_seconds: int) -> None:
    """Limit this process for a chat of so many bytes. The limit of time ends it (SIGXCPU), also
    where nobody waits for it any more.
    """
    # Windows has no such module, and is refused before a chat is read.
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    used_seconds = math.ceil(usage.ru_utime + usage.ru_stime)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (used_seconds + max_seconds, hard_limit))
    _, hard_limit = resource.getrlimit(resource.RLIMIT_AS)
    # Not every system says or limits how much is mapped.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as f:
        used_bytes = int(f.read().split()[0]) * resource.getpagesize()
        max_bytes = used_bytes + MAX_BYTES + BYTES_PER_BYTE * num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, hard_limit))


def _answer(pipe: IO[bytes], kind: bytes, text: str = "") -> None:
    data = text.encode(errors="surrogatepass")
    pipe.write(kind + len(data).to_bytes(8, "little") + data)
    pipe.flush()
