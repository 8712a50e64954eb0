"""The errors that a user sees: one line each, saying what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from attrs import frozen

# Characters of a message, beyond which it is cut.
MAX_LINE_LENGTH = 2000


class BitpressError(Exception):
    """An error of the input or the environment, told in one line; the command line exits with 2."""


class CheckpointError(BitpressError):
    """The model folder cannot be read as what it says it is."""


class DataError(BitpressError):
    """The texts that a model is run on cannot be read, or are too few."""


class RecipeError(BitpressError):
    """A recipe, a scheme's name, an option or a pattern cannot be carried out."""


class SchemeError(BitpressError):
    """An installed scheme broke its contract: a hook raised, or returned what it must not."""


class ShapeError(BitpressError):
    """A scheme cannot take a layer of this shape.

    Schemes raise it from `quantize`; the plan adds the layer's name.
    """


class OutputError(BitpressError):
    """The output folder cannot be written, or holds something else."""


@frozen
class Fault:
    """One thing that is wrong with written files; as text, `subject: text`.

    Attributes:
        subject: the layer, tensor or file that it is about; empty where `text` names it.
        text: what is wrong with it.
    """

    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" if self.subject else self.text


class VerificationError(BitpressError):
    """What was written is not what was planned, or not good enough; the command line exits with 1.

    Attributes:
        faults: what is wrong with the files, one by one.
    """

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = faults


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The end of a message, with the candidate closest to a name; empty where none is close.

    >>> did_you_mean("q_porj", ["q_proj", "up_proj"])
    "; did you mean 'q_proj'?"
    """
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had not enough memory."""
    # By name, since importing torch takes a second.
    return any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__)


def printable(text: str) -> str:
    """A text with its control characters written out, those that end lines too.

    Names of a stranger's model may stand in it: a terminal would obey their escape sequences.
    """
    return "".join(
        character if character.isprintable() else repr(character)[1:-1] for character in text
    )


def printable_line(text: str) -> str:
    """A text as one printable line with single spaces, and not too long."""
    line = " ".join(text.split())
    shown = printable(line[:MAX_LINE_LENGTH])
    return shown if len(line) <= MAX_LINE_LENGTH else shown + "..."


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
