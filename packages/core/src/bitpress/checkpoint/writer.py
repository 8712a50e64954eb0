"""The folder that a run writes into: files appear under their names only when they are complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from attrs import frozen

from bitpress.checkpoint.digests import find_changed_tensors, hash_bytes
from bitpress.checkpoint.filenames import CONFIG, LOCK, PART, RUN_RECORD, RUN_TOKENS
from bitpress.checkpoint.lock import lock_folder
from bitpress.checkpoint.reader import DTYPES, Reader
from bitpress.checkpoint.safetensors import Entry, Header, read_header
from bitpress.errors import CheckpointError, OutputError
from bitpress.runtime import operating_system
from bitpress.runtime.logger import warn


def copy_entry(source: Entry, target: Entry, reader: Reader, writer: ShardWriter) -> None:
    """Write a tensor of the source, unchanged, where the output's header says.

    Raises:
        CheckpointError: it is a weight or a bias, and holds NaN or infinity. Masks may.
    """
    chunks = reader.chunks(source)
    is_parameter = source.name.endswith((".weight", ".bias"))
    if is_parameter and source.dtype in FLOATS:
        chunks = _require_finite(source, chunks)
    writer.write_chunks(target, chunks)


def _require_finite(entry: Entry, chunks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        numbers = chunk.view(DTYPES[entry.dtype])
        # a finite sum has finite terms, and is found several times as fast
        if not math.isfinite(numbers.sum()) and not numbers.isfinite().all():
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} holds NaN or infinity; the source is damaged: "
                "fetch it again"
            )
        yield chunk


# Dtypes, as safetensors names them, that may hold NaN and infinity and are computed with.
FLOATS = ("F64", "F32", "F16", "BF16")

# Bytes of one write: a larger one may get fresh large pages, whose first touch costs more than the
# copying.
WRITE_BYTES = 1 << 20


class ShardWriter:
    """One file being written; tensors may come in any order and from several threads.

    Attributes:
        digests: SHA-256 of each tensor that was written, by its name: taken of the numbers in
            memory, and not of the file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.digests: dict[str, str] = {}

    def write(self, entry: Entry, tensor: torch.Tensor) -> None:
        """Write all of one planned tensor; dtype and shape must be the planned ones."""
        self.write_chunks(entry, [tensor])

    def write_chunks(self, entry: Entry, chunks: Iterable[torch.Tensor]) -> None:
        """Write all of one planned tensor, which comes in pieces: rows, or bytes, in order."""
        digest, position = hashlib.sha256(), entry.start
        for chunk in chunks:
            numbers = chunk.contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(numbers.numpy()))  # type: ignore[arg-type]
            self.write_bytes(position, numbers)
            position += len(numbers)
        self.digests[entry.name] = digest.hexdigest()

    def write_bytes(self, position: int, data: torch.Tensor | bytes) -> None:
        """Write bytes, or a uint8 tensor, at a position counted from the beginning of the file."""
        view = memoryview(data) if isinstance(data, bytes) else memoryview(data.numpy())  # type: ignore[arg-type]
        while view:
            count = os.pwrite(self._descriptor, view[:WRITE_BYTES], position)
            if not count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            view, position = view[count:], position + count


# Mode bits of files and folders where the source has no narrower ones.
FILE_MODE, FOLDER_MODE = 0o644, 0o777


@frozen
class Permissions:
    """Who may read what a run writes, as mode bits.

    Attributes:
        folder: of a folder that is made.
        file: of a file that is made.
    """

    folder: int = FOLDER_MODE
    file: int = FILE_MODE

    @classmethod
    def of(cls, folder: Path, files: Iterable[str]) -> Permissions:
        """Those that every one of a folder's files has."""
        mode = FILE_MODE
        for name in files:
            mode &= _file_mode(folder / name)
        return cls(folder.stat().st_mode & FOLDER_MODE | stat.S_IRWXU, mode)


class OutputFolder:
    """The folder that a run writes into. In `with`, it is locked for this run from `prepare` on.

    A stranger may have put links there, which would lead out of it: it refuses them, and makes
    every file anew.

    Attributes:
        header_digests: SHA-256 of the header of each shard that is finished, by the file's name.
            The header holds the digests of the tensors, so that this proves every byte.
    """

    def __init__(self, folder: Path, permissions: Permissions | None = None) -> None:
        operating_system.require_posix()
        self.folder = folder
        self._permissions = permissions or Permissions()
        self.header_digests: dict[str, str] = {}
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
            OutputError: it holds something else, links or a finished output, another run writes
                into it, it cannot be written, or the disk is too small.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise OutputError(f"{self.folder} is a file; name a folder that does not exist yet")
        self._refuse_finished()
        planned = set(planned)
        self._refuse_files_that_are_folders(planned)
        run_files = {*planned, RUN_RECORD, RUN_TOKENS, LOCK}
        with _explain_os_errors(self.folder):
            if not self.folder.exists():
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                self.folder.mkdir(mode=self._permissions.folder, exist_ok=True)
                _sync_folder(self.folder.parent)
            for name in self._file_names():
                if PART.sub("", name) not in run_files:
                    raise OutputError(
                        f"{self.folder} is not empty: it holds {name}; name another folder or "
                        "empty it"
                    )
            if not os.access(self.folder, os.W_OK):
                raise OutputError(f"{self.folder} cannot be written: no permission")
            self._lock.enter_context(lock_folder(self.folder))
            # A run that had the lock until now may have finished.
            self._refuse_finished()
            # A run that was killed has left its unfinished files.
            for name in filter(PART.search, self._file_names()):
                (self.folder / name).unlink()
            resumed_bytes = sum(
                (self.folder / name).stat().st_size for name in self._file_names() if name != LOCK
            )
            free_bytes = shutil.disk_usage(self.folder).free
            self._require_inodes(run_files)
        if free_bytes + resumed_bytes < num_bytes:
            raise OutputError(
                f"{self.folder}: the disk has {free_bytes / 1e9:.2f} GB free and the output needs "
                f"{num_bytes / 1e9:.2f} GB"
            )

    def _require_inodes(self, names: Collection[str]) -> None:
        """Raise OutputError where the disk has no room for so many files, however small."""
        num_new = len(set(names) - set(self._file_names()))
        status = os.statvfs(self.folder)
        # Some file systems have no table of files that could be full, and count none.
        if status.f_files and status.f_favail < num_new:
            raise OutputError(
                f"{self.folder}: the disk has room for {status.f_favail:,} more files (inodes) and "
                f"the output needs {num_new:,}"
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

    def _file_names(self) -> list[str]:
        """Paths of the files in it; raises OutputError where one would lead out of it."""
        names = []
        for root, folders, files in os.walk(self.folder):
            for name in sorted((*folders, *files)):
                path = Path(root, name)
                _require_plain(path)
                if name in files:
                    names.append(path.relative_to(self.folder).as_posix())
        return names

    def read(self, name: str) -> str | None:
        """The contents of a text file; None where there is none."""
        file = self.folder / name
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that only the run itself needed."""
        with _explain_os_errors(self.folder):
            for name in names:
                (self.folder / name).unlink(missing_ok=True)

    def has_shard(self, name: str, header: Header, num_threads: int = 1) -> bool:
        """Whether an interrupted run of the same plan has written this shard.

        Every tensor is read, and held against the digest that was taken of it in memory. A shard
        that has changed since is removed, with a warning: it is to be written again. The record of
        the run says that it was this one's.
        """
        file = self.folder / name
        if not file.exists():
            return False
        damage = None
        try:
            found = read_header(file)
            if not found.is_same_layout(header):
                damage = f"{file}: its header is not the one that is planned"
            elif changed := find_changed_tensors(found, num_threads):
                damage = f"{file}: tensor {changed[0]} has changed since an earlier run wrote it"
        except CheckpointError as e:
            damage = str(e)
        if damage is not None:
            warn(f"{damage}; the file is written again", stacklevel=2)
            self.remove([name])
            return False
        self.header_digests[name] = hash_bytes(found.raw)
        return True

    @contextlib.contextmanager
    def shard(self, name: str, header: Header) -> Iterator[ShardWriter]:
        """A shard's file with its header, into which the digests of its tensors are put when the
        block ends. Then it gets its name; it is removed when the block raises.
        """
        with self._file(name) as descriptor:
            writer = ShardWriter(descriptor)
            os.ftruncate(descriptor, header.nbytes)
            yield writer
            header = header.with_digests(writer.digests)
            writer.write_bytes(0, header.raw)
        self.header_digests[name] = hash_bytes(header.raw)

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
        with (
            f,
            self._file(name, _file_mode(source)) as descriptor,
            open(descriptor, "wb", closefd=False) as target,
        ):
            shutil.copyfileobj(f, target)

    @contextlib.contextmanager
    def _file(self, name: str, mode: int | None = None) -> Iterator[int]:
        final = self.folder / name
        part = final.with_name(f"{final.name}.{secrets.token_hex(4)}.part")
        with _explain_os_errors(final):
            self._make_parents(name)
            _require_plain(final)
            # O_EXCL: a file of that name, or a link, is not opened.
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            descriptor = os.open(part, flags, self._permissions.file if mode is None else mode)
            try:
                try:
                    yield descriptor
                    operating_system.flush_to_disk(descriptor)
                finally:
                    os.close(descriptor)
                part.rename(final)
                _sync_folder(final.parent)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _make_parents(self, name: str) -> None:
        """Make the folders that a file lies in; a link among them would lead out of this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            folder = self.folder / parent
            _require_plain(folder)
            folder.mkdir(mode=self._permissions.folder, exist_ok=True)


def _file_mode(file: Path) -> int:
    """The mode bits of what is made of a file: nobody may do more with it, but its owner reads."""
    try:
        return file.stat().st_mode & FILE_MODE | stat.S_IRUSR
    except OSError as e:
        raise CheckpointError(f"{file}: {e.strerror or e}") from None


def _require_plain(path: Path) -> None:
    """Raise OutputError unless what is there, if anything, is a folder or a file of one name."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        fact = "it is a link"
    elif stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        fact = "it is a hard link: another file shares its bytes"
    elif stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
        return
    else:
        fact = "it is neither a file nor a folder"
    raise OutputError(f"{path}: {fact}; delete it, or name another folder")


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
