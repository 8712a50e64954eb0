"""Source formats: forms in which models are published, each read by a plugin that an entry point
names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pluggy
from attrs import frozen

from bitpress.checkpoint.quantized_source import QuantizedSource
from bitpress.checkpoint.safetensors import TensorSpec
from bitpress.errors import BitpressError, CheckpointError
from bitpress.schemes.hookspecs import hookspec
from bitpress.schemes.registry import Problem

# The entry point group.
SOURCES = "bitpress.sources"


class SourceHooks:
    """The hook of a source format."""

    @staticmethod
    @hookspec(firstresult=True)
    def find_quantized_weights(
        folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
    ) -> QuantizedSource | None:
        """How a model is to be read, from its config and the headers of its files.

        Args:
            folder: of the model, with files that describe it beside `config.json`.
            config: the contents of `config.json`.
            tensors: what is stored, by name.

        Returns:
            None where the model is not in the plugin's format.

        Raises:
            CheckpointError: it is, and the files are not as the format says; the message names the
                tensor.
        """


@frozen
class SourceFormats:
    """The installed source formats, and what is broken.

    Attributes:
        names: of the entry points.
        packages: that provide them, and their versions.
    """

    names: tuple[str, ...]
    packages: tuple[str, ...]
    problems: tuple[Problem, ...]
    _manager: pluggy.PluginManager

    def find(
        self, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
    ) -> QuantizedSource | None:
        """What the first format that reads a model makes of it; None where none does.

        Raises:
            CheckpointError: the files are not as their format says, or a plugin fails.
        """
        try:
            found = self._manager.hook.find_quantized_weights(
                folder=folder, config=config, tensors=tensors
            )
        except BitpressError:
            raise
        except Exception as e:
            raise CheckpointError(
                f"{folder}: a source format ({', '.join(self.names)}) failed on it: "
                f"{type(e).__name__}: {e}"
            ) from e
        if found is not None and not isinstance(found, QuantizedSource):
            raise CheckpointError(
                f"{folder}: a source format ({', '.join(self.names)}) returned {found!r:.60}, not "
                "a QuantizedSource"
            )
        return found

    def explain(self, method: str) -> str:
        """What a user does about a model whose method none reads, in a few words."""
        broken = "".join(f"; {p.name} of {p.package} is broken: {p.text}" for p in self.problems)
        if not self.names:
            return f"no package that reads such is installed: pip install bitpress-sources{broken}"
        return (
            f"no installed source format reads {method} (installed: {', '.join(self.names)})"
            f"{broken}"
        )


@functools.cache
def discover_formats() -> SourceFormats:
    """All installed source formats."""
    manager = pluggy.PluginManager("bitpress")
    manager.add_hookspecs(SourceHooks)
    names, problems, packages = [], [], set()
    for entry in sorted(metadata.entry_points(group=SOURCES), key=lambda entry: entry.name):
        try:
            manager.register(entry.load(), f"{SOURCES}:{entry.name}")
            manager.check_pending()
        except Exception as e:
            package = entry.dist.name if entry.dist else "an unknown package"
            problems.append(Problem(entry.name, package, f"{type(e).__name__}: {e}"))
        else:
            names.append(entry.name)
            packages.add(f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.name)
    return SourceFormats(tuple(names), tuple(sorted(packages)), tuple(problems), manager)
