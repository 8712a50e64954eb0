"""A model folder as it lies on disk: its tensors, known from headers, and their numbers, read by
rows.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs
import torch
from attrs import frozen

from bitpress.checkpoint.filenames import CONFIG, FILE_NAME, INDEX, WEIGHTS
from bitpress.checkpoint.model_config import ModelConfig
from bitpress.checkpoint.safetensors import MAX_HEADER_BYTES, Entry, Header, encodable, read_header
from bitpress.checkpoint.side_files import check_side_file, choose_side_files, is_weight_file
from bitpress.checkpoint.views import T, View
from bitpress.errors import CheckpointError
from bitpress.runtime import operating_system
from bitpress.runtime.devices import CPU

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# What describes a model in the layout of mistral-inference, which has no `config.json`.
MISTRAL_CONFIG = "params.json"

# Lists and tables within one another in a JSON file.
MAX_JSON_DEPTH = 100


@frozen(eq=False, slots=False)
class Checkpoint:
    """The tensors and files of a model folder.

    Attributes:
        config: the contents of `config.json`.
        headers: by file name, in the order in which the files are numbered.
        entries: every tensor by name, file by file, in the order of their bytes.
        side_files: relative paths of the other files that belong to it.
        left_files: relative paths of those that do not, and are left where they are.
    """

    folder: Path
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    entries: Mapping[str, Entry]
    side_files: tuple[str, ...]
    left_files: tuple[str, ...] = ()

    @cached_property
    def model_config(self) -> ModelConfig:
        """What `config.json` says of the model."""
        return ModelConfig.from_json(self.config)

    def with_side_files(self, names: Sequence[str]) -> Checkpoint:
        """The checkpoint with further files that belong to it, weights left out.

        Raises:
            CheckpointError: one cannot be copied.
        """
        further = [name for name in names if not is_weight_file(name)]
        for name in further:
            check_side_file(self.folder, self.folder / name)
        return attrs.evolve(self, side_files=(*self.side_files, *further))


def open_checkpoint(
    folder: Path, config: Mapping[str, Any] | None = None, copy: Sequence[str] = ()
) -> Checkpoint:
    """The tensors and files of a model folder, from headers alone.

    Args:
        config: stands in for a `config.json` that is not written yet.
        copy: patterns of further files that belong to it.

    Raises:
        CheckpointError: it is not a model folder, or index, headers and files do not agree.
    """
    if (folder / MISTRAL_CONFIG).is_file() and not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder}: it is in Mistral's own layout, with {MISTRAL_CONFIG}: take the files that "
            f"transformers reads ({CONFIG}, model*.safetensors) from the same repository, or "
            "convert it with convert_mistral_weights_to_hf.py of transformers 4"
        )
    config = read_json(folder / CONFIG) if config is None else config
    headers: dict[str, Header] = {}
    entries: dict[str, Entry] = {}
    for name in _weight_files(folder):
        headers[name] = read_header(folder / name)
        for entry in headers[name].entries:
            if entry.name in entries:
                raise CheckpointError(
                    f"{folder}: tensor {entry.name} is in {entries[entry.name].file.name} and in "
                    f"{name}"
                )
            entries[entry.name] = entry
    if (folder / INDEX).is_file():
        _check_index(folder, entries)
    files = choose_side_files(folder, config, headers, copy)
    return Checkpoint(folder, config, headers, entries, files.copied, files.left)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError where it is missing or something else."""
    if not file.parent.is_dir():
        raise CheckpointError(
            f"{file.parent} is not a folder: name one with {file.name} and safetensors files"
        )
    try:
        # Opening a pipe would wait forever.
        if file.exists() and not file.is_file():
            raise CheckpointError(f"{file}: not a regular file")
        if (size := file.stat().st_size) > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{file}: {size} bytes, and at most {MAX_HEADER_BYTES} are read; it is not what "
                "its name says"
            )
        value = json.loads(file.read_bytes())
        if not _writable(value):
            raise ValueError(
                f"a text in it is not Unicode, or it is nested deeper than {MAX_JSON_DEPTH}"
            )
    except FileNotFoundError:
        raise CheckpointError(
            f"{file.parent} is not a model folder: it has no {file.name}"
        ) from None
    except OSError as e:
        raise CheckpointError(f"{file}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: an object is expected, not {type(value).__name__}")
    return value


def _writable(value: Any, depth: int = MAX_JSON_DEPTH) -> bool:
    """Whether a JSON value could be written again."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, (dict, list)):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and all(_writable(item, depth - 1) for item in inner)
    return True


def _weight_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        return sorted({str(name) for name in _weight_map(folder).values()})
    files = sorted(f.name for f in folder.glob("*.safetensors"))
    if WEIGHTS in files:
        return [WEIGHTS]
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files and no {INDEX} that says which belong "
            "together"
        )
    pickles = sorted(
        f.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in folder.glob(pattern)
    )
    if pickles:
        raise CheckpointError(
            f"{folder}: weights only as pickles ({pickles[0]}), which can run code when loaded and "
            "are not read; convert them where you trust them: transformers' "
            "from_pretrained(...).save_pretrained(FOLDER) writes safetensors"
        )
    raise CheckpointError(f"{folder} is not a model folder: it has no safetensors files")


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: it has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{folder / INDEX}: tensor {tensor} is said to lie in {str(name)[:200]!r}, not a "
                "file of this folder"
            )
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder}: shard {name}, named by {INDEX}, is missing; fetch it again"
            )
    return weight_map


def _check_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    weight_map = _weight_map(folder)
    for tensor, name in weight_map.items():
        if tensor not in entries or entries[tensor].file.name != name:
            raise CheckpointError(
                f"{folder}: {INDEX} says that tensor {tensor} is in {name}, and it is not there"
            )
    for tensor in entries:
        if tensor not in weight_map:
            raise CheckpointError(
                f"{folder}: tensor {tensor} of {entries[tensor].file.name} is not in {INDEX}"
            )


class Reader:
    """Reads the numbers of a checkpoint's files, from any thread; use it in `with`.

    It reads into fresh memory and never maps a file: memory stays bounded, and a file that shrinks
    is an error instead of a crash.

    Args:
        pinned: whether rows are read into page-locked memory, from which GPUs copy without the CPU.
    """

    def __init__(self, pinned: bool = False) -> None:
        operating_system.require_posix()
        self._pinned = pinned
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._computed = threading.local()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def rows(self, entry: Entry, first: int, last: int, device: torch.device = CPU) -> torch.Tensor:
        """Rows `first` to `last` (exclusive), in the tensor's dtype; all of one without axes.

        Args:
            device: on which they are; quantized ones are dequantized there.

        Raises:
            CheckpointError: torch has no such dtype, or the file cannot be read or ends too early.
        """
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} has the dtype {entry.dtype}, which torch "
                "cannot hold"
            )
        if isinstance(entry, View):
            view = entry.rows(self, first, last, DTYPES[entry.dtype], device=device)
            return view.to(device)
        shape = (last - first, *entry.shape[1:]) if entry.shape else ()
        tensor = torch.empty(shape, dtype=DTYPES[entry.dtype], pin_memory=self._pinned)
        num_rows = entry.shape[0] if entry.shape else 1
        row_bytes = entry.nbytes // max(num_rows, 1)
        self._fill(entry, first * row_bytes, tensor.reshape(-1).view(torch.uint8))
        # torch does not reuse pinned memory before a copy out of it has ended
        return tensor.to(device, non_blocking=True)

    def expect(self, entry: Entry) -> None:
        """Let the system read a tensor into its cache, which is asked for soon."""
        while isinstance(entry, View):
            entry = entry.stored
        operating_system.read_ahead(self._open(entry.file), entry.start, entry.nbytes)

    def whole(self, entry: Entry) -> torch.Tensor:
        """All of a tensor, in its dtype."""
        return self.rows(entry, 0, entry.shape[0] if entry.shape else 1)

    def transposed(self, entry: Entry) -> torch.Tensor:
        """All of a matrix, transposed."""
        return self.computed(entry, lambda: self.whole(entry).T)

    def computed(self, entry: Entry, compute: Callable[[], T]) -> T:
        """What is computed of a tensor. Each thread caches its last, which is read tile by tile."""
        cache = self._computed
        if getattr(cache, "entry", None) != entry:
            # The old result is released first, so that a thread never holds two.
            cache.entry = cache.result = None
            cache.entry, cache.result = entry, compute()
        return cache.result  # type: ignore[no-any-return]

    def chunks(self, entry: Entry, size: int = 1 << 22) -> Iterator[torch.Tensor]:
        """The bytes of a tensor of any dtype in order, as uint8 tensors of at most `size` bytes.

        Each tensor overwrites the one before.
        """
        if isinstance(entry, View):
            yield from self.computed_chunks(entry, size)
            return
        buffer = torch.empty(min(size, entry.nbytes), dtype=torch.uint8)
        for offset in range(0, entry.nbytes, size):
            chunk = buffer[: min(size, entry.nbytes - offset)]
            self._fill(entry, offset, chunk)
            yield chunk

    def computed_chunks(self, entry: Entry, size: int) -> Iterator[torch.Tensor]:
        """The same of what is computed: rows by rows, so that a vocabulary's embeddings are never
        in memory as a whole.
        """
        num_rows = entry.shape[0]
        step = max(size * num_rows // max(entry.nbytes, 1), 1)
        pending = torch.empty(0, dtype=torch.uint8)
        for first in range(0, num_rows, step):
            rows = self.rows(entry, first, min(first + step, num_rows)).to(DTYPES[entry.dtype])
            pending = torch.cat([pending, rows.reshape(-1).view(torch.uint8)])
            while len(pending) >= size:
                yield pending[:size]
                pending = pending[size:]
        if len(pending):
            yield pending

    def _fill(self, entry: Entry, offset: int, target: torch.Tensor) -> None:
        """Read the tensor's bytes from `offset` on into all of `target` (uint8)."""
        view = memoryview(target.numpy())  # type: ignore[arg-type]
        num_read = 0
        while num_read < len(view):
            position = entry.start + offset + num_read
            try:
                count = operating_system.read_at(self._open(entry.file), view[num_read:], position)
            except OSError as e:
                raise CheckpointError(
                    f"{entry.file}: {e.strerror or e} (while reading {entry.name})"
                ) from None
            if count == 0:
                raise CheckpointError(
                    f"{entry.file}: it ended inside tensor {entry.name}; did it change during the "
                    "run?"
                )
            num_read += count

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self._descriptors[file]
