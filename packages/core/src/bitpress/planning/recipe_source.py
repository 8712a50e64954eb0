"""Where a recipe comes from, as asked for at the border."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from bitpress.errors import RecipeError
from bitpress.planning import recipe
from bitpress.planning.recipe import Recipe, RecipeChanges
from bitpress.schemes.registry import Registry
from bitpress.schemes.values import NORMAL_EFFORT


@frozen
class RecipeSource:
    """A scheme or a recipe file, what is changed in it, and what is copied with it.

    Attributes:
        scheme: a scheme's name, or several joined by `+`.
        file: a TOML file; give one of this, `scheme` and `table`.
        settings: `[SCHEME.]OPTION=VALUE` texts, which override the recipe's options.
        ignore: patterns of layers to leave alone.
        copy: patterns of files of the model's folder to copy, beside those that loaders read.
        table: what a file would hold.
        effort: the level of what is neither set nor in the recipe.
        head: the scheme of the head, or several joined by `+`; None leaves it as it is.
        embeddings: that of the embeddings.
        more_bits: whether layers may get more bits than the source holds them in.
    """

    scheme: str | None = None
    file: Path | None = None
    settings: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    copy: tuple[str, ...] = ()
    table: Mapping[str, Any] | None = None
    effort: str = NORMAL_EFFORT
    head: str | None = None
    embeddings: str | None = None
    more_bits: bool = False

    def require_one(self) -> None:
        """Raise RecipeError unless there is either a scheme or a recipe."""
        if [self.scheme, self.file, self.table].count(None) != 2:
            raise RecipeError(
                "give either a scheme or a recipe (--scheme NAME, --recipe FILE); which scheme "
                "suits says bitpress recommend MODEL"
            )

    def resolve(self, registry: Registry) -> Recipe:
        """The recipe; raises RecipeError where there is none."""
        self.require_one()
        changes = RecipeChanges(
            self.settings, self.ignore, self.effort, self.head, self.embeddings, self.more_bits
        )
        if self.scheme is not None:
            return recipe.from_scheme(self.scheme, registry, changes)
        if self.table is not None:
            return recipe.from_json(self.table, registry, "recipe", changes)
        assert self.file is not None
        return recipe.from_file(self.file, registry, changes)

    @property
    def command_options(self) -> dict[str, object]:
        """Options of a command line that ask for it."""
        return {
            "--scheme": self.scheme,
            # whoever repeats the run writes the table into one
            "--recipe": self.file if self.table is None else "FILE",
            "--set": self.settings,
            "--effort": None if self.effort == NORMAL_EFFORT else self.effort,
            "--ignore": self.ignore,
            "--head": self.head,
            "--embeddings": self.embeddings,
            "--more-bits": self.more_bits,
            "--copy": self.copy,
        }
