"""What a run is asked to do: a plan, and the texts that it needs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attrs import frozen

from bitpress import card, checking, recipe, stacks
from bitpress.calibrate.texts import Choice, Sequences, Stretch, load
from bitpress.checkpoint.reader import Checkpoint, open_checkpoint, resolve
from bitpress.errors import RecipeError
from bitpress.hardware import Hardware
from bitpress.planning import Plan, make_plan
from bitpress.recipe import Recipe
from bitpress.schemes import discover


@frozen(eq=False)
class Job:
    """A plan, and what goes with it.

    Attributes:
        data: what it is calibrated on; None where it needs no data.
        model: its name as it was given.
        check: a text to check the result on.
        command: a command line that asks for the same.
    """

    plan: Plan
    data: Sequences | None
    model: str
    check: Stretch | None = None
    command: str = ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know before starting."""
        return self.plan.warnings + (self.data.warnings if self.data else ())


def plan(
    model: str | Path,
    *,
    scheme: str | None = None,
    recipe_file: str | Path | None = None,
    settings: Iterable[str] = (),
    ignore: Iterable[str] = (),
    device: Hardware | None = None,
) -> Plan:
    """What `compress` would do, from headers alone.

    Args:
        model: a folder, or a Hub name.
        scheme: a scheme's name, or several joined by `+`; give this or `recipe_file`.
        settings: `[SCHEME.]OPTION=VALUE` texts.
        ignore: patterns of layers to leave alone.
        device: on which the result is to be served; None: the one present.

    Raises:
        BitpressError: the model, the recipe, or their combination cannot be carried out.
    """
    return make_plan(*_asked_for(model, scheme, recipe_file, settings, ignore), device=device)


def prepare(
    model: str | Path,
    *,
    scheme: str | None = None,
    recipe_file: str | Path | None = None,
    settings: Iterable[str] = (),
    ignore: Iterable[str] = (),
    calibration: Choice | None = None,
    check: str | None = None,
    trust_remote_code: bool = False,
) -> Job:
    """The plan, the calibration data if the recipe needs some, and the text of `check`; as `plan`
    otherwise.
    """
    settings, ignore = tuple(settings), tuple(ignore)
    source, rules = _asked_for(model, scheme, recipe_file, settings, ignore)
    # what headers can refuse is refused before texts are read
    work = make_plan(source, rules)
    text = None if check is None else checking.text(work, check, trust_remote_code)
    chosen = (calibration or Choice()) if rules.calibrated else None
    asked = {
        "--scheme": scheme,
        "--recipe": None if recipe_file is None else Path(recipe_file),
        "--set": settings,
        "--ignore": ignore,
        **(chosen.words if chosen else {}),
        "--check": None if check is None else Path(check),
    }
    command = card.command(named(str(model)), asked)
    if chosen is None:
        return Job(work, None, str(model), text, command)
    data = load(chosen, source.folder, source.config, trust_remote_code)
    if data.all_experts and not any(stacks.experts(stack.members) for stack in work.stacks):
        raise RecipeError("--all-experts: no experts of this model are compressed; leave it out")
    return Job(
        make_plan(source, rules, data.digest + " all experts" * data.all_experts),
        data,
        str(model),
        text,
        command,
    )


def named(model: str) -> str:
    """The Hub name of a model, or its folder's own name."""
    return model if "/" in model and not Path(model).exists() else Path(model).resolve().name


def _asked_for(
    model: str | Path,
    scheme: str | None,
    recipe_file: str | Path | None,
    settings: Iterable[str],
    ignore: Iterable[str],
) -> tuple[Checkpoint, Recipe]:
    if (scheme is None) == (recipe_file is None):
        raise RecipeError("give either a scheme or a recipe file")
    source, registry = open_checkpoint(resolve(model)), discover()
    if scheme is not None:
        return source, recipe.from_scheme(scheme, registry, settings, ignore)
    return source, recipe.from_file(Path(recipe_file or ""), registry, settings, ignore)
