"""Where a recipe comes from, as asked for at the border."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from bitpress.errors import RecipeError
from bitpress.planning import recipe
from bitpress.planning.recipe import Recipe
from bitpress.schemes.registry import Registry


@frozen
class RecipeSource:
    """A scheme or a recipe file, what is changed in it, and what is copied with it.

    Attributes:
        scheme: a scheme's name, or several joined by `+`.
        file: a TOML file; give this or `scheme`.
        settings: `[SCHEME.]OPTION=VALUE` texts, which override the recipe's options.
        ignore: patterns of layers to leave alone.
        copy: patterns of files of the model's folder to copy, beside those that loaders read.
    """

    scheme: str | None = None
    file: Path | None = None
    settings: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    copy: tuple[str, ...] = ()

    def require_one(self) -> None:
        """Raise RecipeError unless there is either a scheme or a file."""
        if (self.scheme is None) == (self.file is None):
            raise RecipeError("give either a scheme or a recipe file")

    def resolve(self, registry: Registry) -> Recipe:
        """The recipe; raises RecipeError where there is none."""
        self.require_one()
        if self.scheme is not None:
            return recipe.from_scheme(self.scheme, registry, self.settings, self.ignore)
        assert self.file is not None
        return recipe.from_file(self.file, registry, self.settings, self.ignore)

    @property
    def command_options(self) -> dict[str, object]:
        """Options of a command line that ask for it."""
        return {
            "--scheme": self.scheme,
            "--recipe": self.file,
            "--set": self.settings,
            "--ignore": self.ignore,
            "--copy": self.copy,
        }
