"""Models on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from bitpress.errors import CheckpointError, first_line

# The folder of a revision in the cache of huggingface_hub is called as its commit.
SNAPSHOTS, COMMIT = "snapshots", re.compile(r"[0-9a-f]{40}")


def split_revision(name: str) -> tuple[str, str | None]:
    """A Hub name, and the branch, tag or commit after its `@`, as `hf://` paths have it."""
    name, _, revision = name.partition("@")
    return name, revision or None


def resolve(model: str | Path, fetch: Callable[[str, str | None], str] | None = None) -> Path:
    """The folder of a model: the path itself, or where a Hub name (`organisation/name`, or
    `organisation/name@revision`) has been downloaded to.

    Args:
        fetch: downloads a name at a revision, and returns the folder.

    Raises:
        CheckpointError: neither a folder nor a name that the Hub could resolve.
    """
    path = Path(model).expanduser()
    name, revision = split_revision(str(model))
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path
    try:
        return Path((fetch or _download)(name, revision))
    except Exception as e:
        # the Hub client raises many kinds: network, rights, names
        raise CheckpointError(
            f"{model} is no folder, and the Hub did not give it: {first_line(e)}"
        ) from None


def read_commit(folder: Path) -> str | None:
    """The commit of a folder that was downloaded from the Hub; None for other folders."""
    is_snapshot = folder.parent.name == SNAPSHOTS and COMMIT.fullmatch(folder.name)
    return folder.name if is_snapshot else None


def _download(name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        name,
        revision=revision,
        ignore_patterns=[
            "*.bin",
            "*.pt",
            "*.pth",
            "*.ckpt",
            "*.gguf",
            "*.h5",
            "*.msgpack",
            "original/*",
        ],
    )
