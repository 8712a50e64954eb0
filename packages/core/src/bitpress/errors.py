"""The faults bitpress tells its users about: one line each, naming the place, the fact and the
fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from attrs import frozen

# characters of a line
LONGEST = 2000


class BitpressError(Exception):
    """A fault of the input or the surroundings, told in one line; the command line exits with 2."""


class CheckpointError(BitpressError):
    """The model folder cannot be read as what it says it is."""


class DataError(BitpressError):
    """The texts that a model is to be run on cannot be read, or are too few."""


class RecipeError(BitpressError):
    """The recipe, a scheme's name, an option or a pattern is not one that can be carried out."""


class SchemeError(BitpressError):
    """An installed scheme broke its contract: it raised, or gave back what it must not."""


class ShapeError(BitpressError):
    """A scheme cannot take a layer of this shape; schemes raise it from `quantize`, and the plan
    adds the layer's name.
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
    """What was written is not what was planned, or not good enough; the command line exits with
    1.
    """

    def __init__(self, message: str, faults: Sequence[Fault] = ()) -> None:
        super().__init__(message)
        self.faults = faults


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?` with the closest known name, or nothing where none is close.

    >>> nearest("q_porj", ["q_proj", "up_proj"])
    "; did you mean 'q_proj'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def memory_is_full(error: BaseException) -> bool:
    """Whether a device had no memory left for what was asked of it (torch.OutOfMemoryError, known
    by name: torch is large).
    """
    return type(error).__name__ == "OutOfMemoryError"


def plain(text: str) -> str:
    """One line that a terminal shows and does not obey, whatever names of a stranger's model are in
    it.
    """
    line = " ".join(text.split())
    shown = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line[:LONGEST])
    return shown if len(line) <= LONGEST else shown + "..."


def first_line(error: BaseException) -> str:
    """What an exception of another library says, cut to its first line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
