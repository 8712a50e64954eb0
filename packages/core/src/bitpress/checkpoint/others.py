"""The files of a model's folder that hold no weights: they are copied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from bitpress.errors import CheckpointError


def other_files(folder: Path, weights: tuple[str, ...]) -> Iterator[str]:
    """Relative paths of the files of a model's folder but those that end as weights do.

    Raises:
        CheckpointError: one cannot be copied.
    """
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__pycache__")))
        for name in sorted(files):
            relative = (Path(root) / name).relative_to(folder)
            if not name.startswith(".") and not name.endswith(weights):
                _check_other(folder, folder / relative)
                yield relative.as_posix()


def _check_other(folder: Path, file: Path) -> None:
    """A file that will be copied: regular, readable, and not a link to what is no part of the
    model, such as a private key.

    The Hub's cache keeps a model's files as links into the `blobs` beside its `snapshots`.
    """
    if not file.is_file() or not os.access(file, os.R_OK):
        raise CheckpointError(
            f"{file}: not a regular file that can be read; mend it or take it away"
        )
    real, home = file.resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and not real.is_relative_to(blobs):
        raise CheckpointError(
            f"{file}: a link that leads out of the model's folder, to {real}; put the file itself "
            "there, if it belongs"
        )
