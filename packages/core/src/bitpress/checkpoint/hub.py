"""Models on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitpress.errors import CheckpointError, first_line


def resolve(model: str | Path, fetch: Callable[[str], str] | None = None) -> Path:
    """The folder of a model: the path itself, or where a Hub name (`organisation/name`) has been
    downloaded to.

    Raises:
        CheckpointError: neither a folder nor a name that the Hub could resolve.
    """
    path = Path(model).expanduser()
    name = str(model)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return path
    try:
        return Path((fetch or _download)(name))
    except Exception as e:
        # the Hub client raises many kinds: network, rights, names
        raise CheckpointError(
            f"{name} is no folder, and the Hub did not give it: {first_line(e)}"
        ) from None


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(
        name,
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
