"""safetensors headers, read and written; the numbers behind them are not touched here.

The layout (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header,
the header as JSON (`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text:
text}}`), then the numbers without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import field, frozen

from bitpress.errors import CheckpointError

BITS: Mapping[str, int] = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "C64": 64,
}

# bytes; the same limit as the safetensors library
LARGEST = 100_000_000

# characters of a tensor's name; real ones have a tenth
LONGEST = 1000

# of a shape, as torch allows
DIMENSIONS = 64

# of a shape or an offset
MOST = 2**63

# bytes of a header from which on it is looked at for what would fill memory when it is parsed
CROWDED = 1_000_000


@frozen
class Entry:
    """Where one tensor's numbers lie: `nbytes` bytes from `start` (counted from the beginning of
    `file`), rows in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * BITS[self.dtype] // 8


@frozen
class Header:
    """One file's tensors in the order of their bytes, its metadata, and the header itself as
    stored.

    Attributes:
        stamp: size and time of change (ns) of a file that was read.
    """

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    raw: bytes
    stamp: tuple[int, int] | None = field(default=None, eq=False)

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.raw) + sum(e.nbytes for e in self.entries)


def lay_out(
    file: Path, tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Header:
    """The header of a file to be written: (name, dtype, shape) in any order, laid out widest dtype
    first, then by name.
    """
    ordered = sorted(tensors, key=lambda t: (-BITS[t[1]], t[0]))
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    at, starts = 0, []
    for name, dtype, shape in ordered:
        starts.append(at)
        at += math.prod(shape) * BITS[dtype] // 8
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[-1], at]}
    text = json.dumps(table, separators=(",", ":")).encode()
    # so that the widest numbers are aligned
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    places = zip(ordered, starts, strict=True)
    return Header(
        tuple(Entry(n, d, s, file, len(raw) + start) for (n, d, s), start in places), metadata, raw
    )


def index(files: Mapping[str, Iterable[Entry]]) -> dict[str, Any]:
    """`model.safetensors.index.json` of several files."""
    places = sorted(
        (entry.name, name, entry.nbytes) for name, entries in files.items() for entry in entries
    )
    return {
        "metadata": {"total_size": sum(size for *_, size in places)},
        "weight_map": {tensor: name for tensor, name, _ in places},
    }


def read_header(file: Path) -> Header:
    """The header of a file, every claim of it checked against the file's size.

    Raises:
        CheckpointError: the file is missing, cut short, or its header is not consistent; the
            message names file and tensor.
    """
    # opening a pipe would wait for ever
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file}: not a regular file")
    try:
        with file.open("rb") as f:
            found = os.fstat(f.fileno())
            size = found.st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST):
                raise CheckpointError(
                    f"{file}: cut short or not a safetensors file ({size} bytes); fetch it again"
                )
            raw = length.to_bytes(8, "little") + f.read(length)
    except OSError as e:
        raise CheckpointError(f"{file}: {e.strerror or e}") from None
    try:
        # a tensor has three, and 50 bytes
        if len(raw) > CROWDED and 12 * (raw.count(b"[") + raw.count(b"{")) > len(raw):
            raise ValueError("it is nested as no header is")
        table = json.loads(raw[8:], object_pairs_hook=_unique)
        if not isinstance(table, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{file}: the safetensors header is not valid ({e}); fetch the file again"
        ) from None
    metadata = table.pop("__metadata__", {})
    entries = sorted(
        (_entry(file, name, item, len(raw)) for name, item in table.items()),
        key=lambda e: (e.start, e.nbytes),
    )
    at = len(raw)
    for entry in entries:
        if entry.start != at:
            raise CheckpointError(
                f"{file}: tensor {entry.name} overlaps another or leaves a gap; fetch the file "
                "again"
            )
        at += entry.nbytes
    if at != size:
        what = "is cut short: fetch it again" if at > size else "is longer than its header says"
        raise CheckpointError(f"{file}: {size} bytes where its header describes {at}; it {what}")
    return Header(
        tuple(entries),
        metadata if isinstance(metadata, dict) else {},
        raw,
        (size, found.st_mtime_ns),
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def is_name(text: str) -> bool:
    """Whether a text can be a tensor's name: not endless, and no half of a surrogate pair in it,
    which no file can hold.
    """
    return len(text) <= LONGEST and encodable(text)


def encodable(text: str) -> bool:
    """Whether a text is Unicode: JSON may spell halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(file: Path, name: str, item: Any, data: int) -> Entry:
    """One header item checked on its own: dtype known, shape and offsets whole numbers that
    agree.
    """
    if not is_name(name):
        raise CheckpointError(
            f"{file}: a tensor's name is no name ({name[:60]!r}); fetch the file again"
        )
    try:
        dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
        # before it is copied
        whole = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= DIMENSIONS
        whole = whole and all(type(n) is int and 0 <= n < MOST for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole, dtype, shape, begin, end = False, None, [], 0, 0
    if not whole:
        raise CheckpointError(
            f"{file}: tensor {name} has no valid dtype, shape and offsets; fetch the file again"
        )
    if dtype not in BITS:
        raise CheckpointError(f"{file}: tensor {name} has the unknown dtype {dtype[:20]!r}")
    entry = Entry(name, dtype, tuple(shape), file, data + begin)
    if entry.nbytes != end - begin:
        raise CheckpointError(
            f"{file}: tensor {name} is said to have {end - begin} bytes, its shape needs "
            f"{entry.nbytes}"
        )
    return entry
