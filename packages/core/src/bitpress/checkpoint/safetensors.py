"""safetensors headers, read and written; the numbers behind them are not touched here.

The layout (https://github.com/huggingface/safetensors): 8 bytes little-endian length of the header,
the header as JSON (`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text:
text}}`), then the numbers without gaps.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from bitpress.errors import CheckpointError

# Those that torch has no dtype for, or whose numbers no scheme reads, are copied byte for byte.
BITS: Mapping[str, int] = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
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

# The limit of the safetensors library, in bytes.
MAX_HEADER_BYTES = 100_000_000

# Characters of a tensor's name; those of published models have a tenth.
MAX_NAME_LENGTH = 1000

# Axes of a shape, as torch allows.
MAX_DIMENSIONS = 64

# A number in a shape, or an offset, is smaller.
MAX_SIZE = 2**63

# The key of a header's metadata under which the digests of its tensors stand: SHA-256 in
# hexadecimal, of one tensor after the other in the order of their bytes.
DIGESTS = "sha256"

# Characters of one of them.
DIGEST_LENGTH = 64

# Headers of more bytes are checked for nested lists, which fill memory when they are parsed: 1 MB
# of `[]` becomes 22 MB of Python lists (measured with tracemalloc).
NESTING_CHECK_BYTES = 1_000_000


@frozen
class TensorSpec:
    """How a tensor is stored: its dtype, as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.numel * BITS[self.dtype] // 8


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
    def spec(self) -> TensorSpec:
        """How it is stored."""
        return TensorSpec(self.dtype, self.shape)

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.spec.nbytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that they are made of."""
        return self.nbytes


@frozen
class Header:
    """The header of a file.

    Attributes:
        entries: the tensors, in the order of their bytes.
        metadata: texts by name.
        raw: the header's bytes, its length included.
        stamp: size in bytes and time of the last change in ns, of a file that was read.
    """

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    raw: bytes
    stamp: tuple[int, int] | None = field(default=None, eq=False)

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.raw) + sum(entry.nbytes for entry in self.entries)

    @property
    def digests(self) -> Mapping[str, str] | None:
        """SHA-256 of each tensor's numbers by its name; None where the header holds none."""
        text = self.metadata.get(DIGESTS, "")
        if not re.fullmatch(f"[0-9a-f]{{{DIGEST_LENGTH * len(self.entries)}}}", text):
            return None
        starts = range(0, len(text), DIGEST_LENGTH)
        return {
            entry.name: text[start : start + DIGEST_LENGTH]
            for entry, start in zip(self.entries, starts, strict=True)
        }

    def with_digests(self, digests: Mapping[str, str]) -> Header:
        """The same header, of the same size, with other digests in the place of its own."""
        text = "".join(digests[entry.name] for entry in self.entries)
        # metadata stand first: what is replaced is no tensor's name
        raw = self.raw.replace(self.metadata[DIGESTS].encode(), text.encode(), 1)
        return evolve(self, metadata={**self.metadata, DIGESTS: text}, raw=raw)

    def is_same_layout(self, other: Header) -> bool:
        """Whether two headers are equal but for the digests of their tensors."""
        if self.digests is None or other.digests is None:
            return self.raw == other.raw
        return self.with_digests(other.digests).raw == other.raw


def lay_out(file: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> Header:
    """The header of a file to be written, the tensors with the widest numbers first, then by name.

    Args:
        specs: by the tensor's name, in any order.
        metadata: beside it, zeros stand for the digests of the tensors.
    """
    metadata = {**metadata, DIGESTS: "0" * (DIGEST_LENGTH * len(specs))}
    ordered = sorted(specs.items(), key=lambda item: (-BITS[item[1].dtype], item[0]))
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, spec in ordered:
        end = begin + spec.nbytes
        table[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
        begin = end

    # The header is padded to 8 bytes, so that the widest numbers are aligned.
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text

    entries = []
    for name, spec in ordered:
        start = len(raw) + table[name]["data_offsets"][0]
        entries.append(Entry(name, spec.dtype, spec.shape, file, start))
    return Header(tuple(entries), metadata, raw)


def make_index(files: Mapping[str, Iterable[Entry]]) -> dict[str, Any]:
    """`model.safetensors.index.json` of several files."""
    tensors = sorted(
        (entry.name, file, entry.nbytes) for file, entries in files.items() for entry in entries
    )
    return {
        "metadata": {"total_size": sum(nbytes for *_, nbytes in tensors)},
        "weight_map": {name: file for name, file, _ in tensors},
    }


def read_header(file: Path) -> Header:
    """The header of a file, every claim of it checked against the file's size.

    Raises:
        CheckpointError: the file is missing, cut short, or its header is not consistent; the
            message names file and tensor.
    """
    raw, status = _read_raw_header(file)
    table = _parse_header(file, raw)
    metadata = _metadata(file, table.pop("__metadata__", None))
    entries = sorted(
        (_entry(file, name, item, len(raw)) for name, item in table.items()),
        key=lambda entry: (entry.start, entry.nbytes),
    )

    end = len(raw)
    for entry in entries:
        if entry.start != end:
            raise CheckpointError(
                f"{file}: tensor {entry.name} overlaps another or leaves a gap; fetch the file "
                "again"
            )
        end += entry.nbytes
    size = status.st_size
    if end != size:
        what = "is cut short: fetch it again" if end > size else "is longer than its header says"
        raise CheckpointError(f"{file}: {size} bytes where its header describes {end}; it {what}")
    return Header(
        tuple(entries),
        metadata,
        raw,
        (size, status.st_mtime_ns),
    )


def _read_raw_header(file: Path) -> tuple[bytes, os.stat_result]:
    # Opening a pipe would wait forever.
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file}: not a regular file")
    try:
        with file.open("rb") as f:
            status = os.fstat(f.fileno())
            length = int.from_bytes(f.read(8), "little")
            if status.st_size < 8 or length > min(status.st_size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file}: cut short or not a safetensors file ({status.st_size} bytes); fetch "
                    "it again"
                )
            return length.to_bytes(8, "little") + f.read(length), status
    except OSError as e:
        raise CheckpointError(f"{file}: {e.strerror or e}") from None


def _parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        # A tensor takes three brackets and at least 50 bytes.
        num_brackets = raw.count(b"[") + raw.count(b"{")
        if len(raw) > NESTING_CHECK_BYTES and 12 * num_brackets > len(raw):
            raise ValueError("it is nested as no header is")
        # Given bytes, json would take UTF-16 and UTF-32 too.
        table = json.loads(
            raw[8:].decode(),
            object_pairs_hook=_unique,
            parse_int=_whole_number,
            parse_constant=_refuse_constant,
        )
        if not isinstance(table, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{file}: the safetensors header is not valid ({e}); fetch the file again"
        ) from None
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _whole_number(text: str) -> int:
    # The safetensors library takes it for a fraction.
    if text == "-0":
        raise ValueError("-0 is no size")
    return int(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _metadata(file: Path, table: Any) -> dict[str, str]:
    """The metadata, which are texts by name; the library takes null for none."""
    if table is None:
        return {}
    texts = [*table, *table.values()] if isinstance(table, dict) else [None]
    if not all(isinstance(text, str) and encodable(text) for text in texts):
        raise CheckpointError(
            f"{file}: its __metadata__ are not texts by name; fetch the file again"
        )
    return dict(table)


def is_name(text: str) -> bool:
    """Whether a text can be a tensor's name: at most `MAX_NAME_LENGTH` characters, all Unicode."""
    return len(text) <= MAX_NAME_LENGTH and encodable(text)


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may spell halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(file: Path, name: str, item: Any, header_bytes: int) -> Entry:
    """One item of a header, checked on its own: its dtype is known, its shape and offsets are whole
    numbers that agree.
    """
    if not is_name(name):
        raise CheckpointError(
            f"{file}: a tensor's name is no name ({name[:60]!r}); fetch the file again"
        )
    try:
        dtype, shape, (begin, end) = item["dtype"], item["shape"], item["data_offsets"]
        # The number of axes is checked first: a hostile header's may be millions.
        is_valid = isinstance(dtype, str) and isinstance(shape, list)
        is_valid = is_valid and len(shape) <= MAX_DIMENSIONS
        is_valid = is_valid and all(
            type(n) is int and 0 <= n < MAX_SIZE for n in (*shape, begin, end)
        )
    except (KeyError, TypeError, ValueError):
        is_valid, dtype, shape, begin, end = False, None, [], 0, 0
    if not is_valid:
        raise CheckpointError(
            f"{file}: tensor {name} has no valid dtype, shape and offsets; fetch the file again"
        )
    if dtype not in BITS:
        raise CheckpointError(f"{file}: tensor {name} has the unknown dtype {dtype[:20]!r}")
    entry = Entry(name, dtype, tuple(shape), file, header_bytes + begin)
    # The library multiplies the axes in 64 bits, and so an axis of 0 does not make up for others.
    if math.prod(filter(None, shape)) >= MAX_SIZE:
        raise CheckpointError(f"{file}: tensor {name} has a shape that is larger than any memory")
    if entry.numel * BITS[dtype] % 8:
        raise CheckpointError(
            f"{file}: tensor {name} does not fill its last byte: {entry.numel} numbers of "
            f"{BITS[dtype]} bits"
        )
    if entry.nbytes != end - begin:
        raise CheckpointError(
            f"{file}: tensor {name} is said to have {end - begin} bytes, its shape needs "
            f"{entry.nbytes}"
        )
    return entry
