"""The folder that a run writes into: files appear under their names only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch

from bitpress.checkpoint.filenames import CONFIG, LOCK, RUN_RECORD
from bitpress.checkpoint.lock import lock_folder
from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Entry, Header, read_header
from bitpress.errors import CheckpointError, OutputError


def copy_entry(source: Entry, target: Entry, reader: Reader, writer: ShardWriter) -> None:
    """Write a tensor of the source, unchanged, where the output's header says."""
    position = target.start
    for chunk in reader.chunks(source):
        writer.write_bytes(position, chunk)
        position += len(chunk)


# Bytes of one write: a larger one may get fresh large pages, whose first touch costs more than the
# copying.
WRITE_BYTES = 1 << 20


class ShardWriter:
    """One file being written; tensors may come in any order and from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, entry: Entry, tensor: torch.Tensor) -> None:
        """Write all of one planned tensor; dtype and shape must be the planned ones."""
        self.write_bytes(entry.start, tensor.contiguous().reshape(-1).view(torch.uint8))

    def write_rows(self, entry: Entry, first: int, rows: torch.Tensor) -> None:
        """Write rows of a planned tensor, from row `first` on."""
        row_bytes = entry.nbytes // entry.shape[0]
        numbers = rows.contiguous().reshape(-1).view(torch.uint8)
        self.write_bytes(entry.start + first * row_bytes, numbers)

    def write_bytes(self, position: int, data: torch.Tensor | bytes) -> None:
        """Write bytes, or a uint8 tensor, at a position counted from the beginning of the file."""
        view = memoryview(data) if isinstance(data, bytes) else memoryview(data.numpy())  # type: ignore[arg-type]
        while view:
            count = os.pwrite(self._descriptor, view[:WRITE_BYTES], position)
            view, position = view[count:], position + count


class OutputFolder:
    """The folder that a run writes into. In `with`, it is locked for this run from `prepare` on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()

    def prepare(self, planned: Iterable[str], num_bytes: int) -> None:
        """Make and lock the folder, which may hold what an interrupted run of the same plan left.

        Args:
            planned: names of all files that the run writes.
            num_bytes: the size of the output.

        Raises:
            OutputError: it holds something else or a finished output, another run writes into it,
                it cannot be written, or the disk is too small.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder} is a file; name a folder that does not exist yet")
        self._refuse_finished()
        planned = set(planned)
        self._refuse_files_that_are_folders(planned)
        run_files = [*planned, RUN_RECORD, LOCK]
        expected = {name + ending for name in run_files for ending in ("", ".part")}
        with _explain_os_errors(self.folder):
            if not self.folder.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                _sync_folder(self.folder.parent)
            present = {f.relative_to(self.folder).as_posix() for f in self._files()}
            if unexpected := sorted(present - expected):
                raise OutputError(
                    f"{self.folder} is not empty: it holds {unexpected[0]}; name another folder or "
                    "empty it"
                )
            if not os.access(self.folder, os.W_OK):
                raise OutputError(f"{self.folder} cannot be written: no permission")
            self._lock.enter_context(lock_folder(self.folder))
            # A run that had the lock until now may have finished.
            self._refuse_finished()
            resumed_bytes = sum(f.stat().st_size for f in self._files() if f.name != LOCK)
            free_bytes = shutil.disk_usage(self.folder).free
        if free_bytes + resumed_bytes < num_bytes:
            raise OutputError(
                f"{self.folder}: the disk has {free_bytes / 1e9:.2f} GB free and the output needs "
                f"{num_bytes / 1e9:.2f} GB"
            )

    @property
    def is_locked(self) -> bool:
        """Whether a run, this one or that of another rank, has prepared the folder."""
        return (self.folder / LOCK).exists()

    def _refuse_finished(self) -> None:
        # A run that was killed while it removed its own files still has its record, and resumes.
        if (self.folder / CONFIG).exists() and not (self.folder / RUN_RECORD).exists():
            raise OutputError(
                f"{self.folder} already holds a model; name another folder or delete it"
            )

    def _refuse_files_that_are_folders(self, planned: Collection[str]) -> None:
        for name in planned:
            parents = [parent.as_posix() for parent in PurePosixPath(name).parents]
            if file := next((parent for parent in parents if parent in planned), None):
                raise OutputError(
                    f"{self.folder / file} would be a file, and a folder too, with {name}: rename "
                    "that"
                )

    def _files(self) -> list[Path]:
        return [f for f in self.folder.rglob("*") if not f.is_dir()]

    def read(self, name: str) -> str | None:
        """The contents of a text file; None where there is none."""
        file = self.folder / name
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that only the run itself needed."""
        with _explain_os_errors(self.folder):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def has_shard(self, name: str, header: Header) -> bool:
        """Whether an interrupted run of the same plan has written this shard.

        Raises:
            OutputError: there is a shard of that name, and another plan wrote it.
        """
        file = self.folder / name
        if not file.exists():
            return False
        try:
            is_same_plan = read_header(file).raw == header.raw
        except CheckpointError:
            is_same_plan = False
        if not is_same_plan:
            raise OutputError(
                f"{file} was left by another run (recipe, versions or source differ); delete the "
                "folder first"
            )
        return True

    @contextlib.contextmanager
    def shard(self, name: str, header: Header) -> Iterator[ShardWriter]:
        """A shard's file with its header. It gets its name when the block ends, and is removed when
        the block raises.
        """
        with self._file(name) as descriptor:
            writer = ShardWriter(descriptor)
            writer.write_bytes(0, header.raw)
            os.ftruncate(descriptor, header.nbytes)
            yield writer

    def write_text(self, name: str, content: str) -> None:
        """Write a text file."""
        with self._file(name) as descriptor:
            ShardWriter(descriptor).write_bytes(0, content.encode())

    def copy_file(self, name: str, source: Path) -> None:
        """Copy a file of the source, byte for byte."""
        try:
            f = source.open("rb")
        except OSError as e:
            raise CheckpointError(f"{source}: {e.strerror or e}") from None
        with f, self._file(name) as descriptor, open(descriptor, "wb", closefd=False) as target:
            shutil.copyfileobj(f, target)

    @contextlib.contextmanager
    def _file(self, name: str) -> Iterator[int]:
        final = self.folder / name
        part = final.with_name(final.name + ".part")
        with _explain_os_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
            try:
                try:
                    yield descriptor
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                part.rename(final)
                _sync_folder(final.parent)
            except BaseException:
                part.unlink(missing_ok=True)
                raise


def format_json(value: Mapping[str, Any]) -> str:
    """JSON, indented for people."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _explain_os_errors(path: Path) -> Iterator[None]:
    """Raise an operating system's error as an OutputError that names the path and the fix."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path}: the disk is full; make room and run the same command again: finished "
                "shards stay"
            ) from e
        raise OutputError(f"{path}: {e.strerror or e}") from e


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
