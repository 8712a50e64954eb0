"""Data-free work: shard by shard, stack by stack, in row tiles that stay in a core's cache, or keep
a GPU busy.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch

from bitpress.checkpoint import lock
from bitpress.checkpoint.filenames import RUN_RECORD
from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Entry, Header, read_header
from bitpress.errors import CheckpointError, OutputError


def copy_entry(entry: Entry, place: Entry, reader: Reader, writer: ShardWriter) -> None:
    """Write a tensor of the source as it is."""
    at = place.start
    for chunk in reader.chunks(entry):
        writer.write_bytes(at, chunk)
        at += len(chunk)


# bytes of one write: larger ones may get fresh large pages, whose first touch costs more than the
# copying
PIECE = 1 << 20


class ShardWriter:
    """One file being written; tensors may come in any order and from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, entry: Entry, tensor: torch.Tensor) -> None:
        """The numbers of one planned tensor; dtype and shape must be the planned ones."""
        self.write_bytes(entry.start, tensor.contiguous().reshape(-1).view(torch.uint8))

    def write_rows(self, entry: Entry, first: int, rows: torch.Tensor) -> None:
        """Rows of a planned tensor, from row `first` on."""
        self.write_bytes(
            entry.start + first * (entry.nbytes // entry.shape[0]),
            rows.contiguous().reshape(-1).view(torch.uint8),
        )

    def write_bytes(self, at: int, data: torch.Tensor | bytes) -> None:
        """Bytes (uint8) at an absolute place."""
        view = memoryview(data) if isinstance(data, bytes) else memoryview(data.numpy())  # type: ignore[arg-type]
        while view:
            count = os.pwrite(self._descriptor, view[:PIECE], at)
            view, at = view[count:], at + count


class OutputFolder:
    """The folder a run writes into; used in `with`, it is this run's alone from `prepare` on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held = contextlib.ExitStack()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    def prepare(self, planned: Iterable[str], needed: int) -> None:
        """Make the folder, or see that it holds nothing but what an interrupted run of the same
        plan left, and lock it.

        Args:
            needed: bytes that the disk must have room for.

        Raises:
            OutputError: it holds something else or a finished output, another run writes into it,
                it cannot be written, or the disk is too small.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder} is a file; name a folder that does not exist yet")
        self._refuse_finished()
        planned = set(planned)
        for name in planned:
            if place := next(
                (p for p in PurePosixPath(name).parents if p.as_posix() in planned), None
            ):
                raise OutputError(
                    f"{self.folder / place} would be a file, and a folder too, with {name}: rename "
                    "that"
                )
        expected = {
            name + ending for name in [*planned, RUN_RECORD, lock.NAME] for ending in ("", ".part")
        }
        with _told(self.folder):
            if not self.folder.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                _sync_folder(self.folder.parent)
            strangers = sorted(
                {f.relative_to(self.folder).as_posix() for f in self._present()} - expected
            )
            if strangers:
                raise OutputError(
                    f"{self.folder} is not empty: it holds {strangers[0]}; name another folder or "
                    "empty it"
                )
            if not os.access(self.folder, os.W_OK):
                raise OutputError(f"{self.folder} cannot be written: no permission")
            self._held.enter_context(lock.locked(self.folder))
            # by a run that had the lock until now
            self._refuse_finished()
            there = sum(f.stat().st_size for f in self._present() if f.name != lock.NAME)
            free = shutil.disk_usage(self.folder).free
        if free + there < needed:
            raise OutputError(
                f"{self.folder}: the disk has {free / 1e9:.2f} GB free and the output needs "
                f"{needed / 1e9:.2f} GB"
            )

    @property
    def locked(self) -> bool:
        """Whether a run, this one or another that it belongs to, has prepared the folder and writes
        into it.
        """
        return (self.folder / lock.NAME).exists()

    def _refuse_finished(self) -> None:
        """A run that was killed while it tidied up may go on; of one that is over nothing is
        written again.
        """
        if (self.folder / "config.json").exists() and not (self.folder / RUN_RECORD).exists():
            raise OutputError(
                f"{self.folder} already holds a model; name another folder or delete it"
            )

    def _present(self) -> list[Path]:
        return [f for f in self.folder.rglob("*") if not f.is_dir()]

    def read(self, name: str) -> str | None:
        """A text file that is there already."""
        file = self.folder / name
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None

    def remove(self, names: Iterable[str]) -> None:
        """Take away files that only the run itself needed."""
        with _told(self.folder):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def finished(self, name: str, header: Header) -> bool:
        """Whether an earlier run of the same plan has written this shard.

        Raises:
            OutputError: a shard of that name is there, and another plan wrote it.
        """
        file = self.folder / name
        if not file.exists():
            return False
        try:
            same = read_header(file).raw == header.raw
        except CheckpointError:
            same = False
        if not same:
            raise OutputError(
                f"{file} was left by another run (recipe, versions or source differ); delete the "
                "folder first"
            )
        return True

    @contextlib.contextmanager
    def shard(self, name: str, header: Header) -> Iterator[ShardWriter]:
        """A shard's file, header written; it takes its name when the block ends well, and is
        removed when it does not.
        """
        with self._file(name) as descriptor:
            writer = ShardWriter(descriptor)
            writer.write_bytes(0, header.raw)
            os.ftruncate(descriptor, header.nbytes)
            yield writer

    def text(self, name: str, content: str) -> None:
        """A text file."""
        with self._file(name) as descriptor:
            ShardWriter(descriptor).write_bytes(0, content.encode())

    def copy(self, name: str, source: Path) -> None:
        """A file of the source, byte for byte."""
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
        with _told(final):
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


def json_text(value: Mapping[str, Any]) -> str:
    """JSON, indented for people."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _told(place: Path) -> Iterator[None]:
    """An operating system's error as one line that names the place and the way out."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{place}: the disk is full; make room and run the same command again: finished "
                "shards stay"
            ) from e
        raise OutputError(f"{place}: {e.strerror or e}") from e


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
