"""What each level of effort chooses for a model, and how long a run takes at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
from attrs import frozen

from bitpress.checkpoint.reader import open_checkpoint
from bitpress.errors import BitpressError
from bitpress.planning.plan import Plan
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe_source import RecipeSource
from bitpress.schemes.options import format_value
from bitpress.schemes.registry import Registry, Step
from bitpress.schemes.values import EFFORT_LEVELS


@frozen
class EffortCost:
    """One level of effort.

    Attributes:
        settings: the options in which levels differ, as `--set` takes them.
        needs_data: whether the run needs calibration data.
        seconds: that it takes, as `plan` estimates it.
        refusal: why nothing can be planned at this level; None where it can.
    """

    level: str
    settings: tuple[str, ...] = ()
    needs_data: bool = False
    seconds: float = 0.0
    refusal: str | None = None


def compare_efforts(
    plan: Plan,
    recipe_source: RecipeSource,
    registry: Registry,
    estimate_seconds: Callable[[Plan], float],
) -> tuple[EffortCost, ...]:
    """Every level, from least effort to most.

    Args:
        plan: at any level.
        recipe_source: that it was made from.
        estimate_seconds: that a run of a plan takes.
    """
    plans: dict[str, Plan] = {}
    refusals: dict[str, str] = {}
    for level in EFFORT_LEVELS:
        try:
            plans[level] = _plan_level(level, [plan, *plans.values()], recipe_source, registry)
        except BitpressError as e:
            refusals[level] = str(e)

    settings = _list_differences({name: plan.recipe.all_steps for name, plan in plans.items()})
    costs = []
    for level in EFFORT_LEVELS:
        if level in refusals:
            costs.append(EffortCost(level, refusal=refusals[level]))
            continue
        level_plan = plans[level]
        seconds = estimate_seconds(level_plan)
        costs.append(EffortCost(level, settings[level], level_plan.calibrated, seconds))
    return tuple(costs)


def _plan_level(
    level: str, plans: Sequence[Plan], recipe_source: RecipeSource, registry: Registry
) -> Plan:
    """The plan at a level: one of those that are there already, where it has the same recipe."""
    recipe = attrs.evolve(recipe_source, effort=level).resolve(registry)
    for plan in plans:
        if plan.recipe.as_json() == recipe.as_json():
            return plan
    checkpoint = open_checkpoint(plans[0].source.folder, copy=recipe_source.copy)
    return make_plan(checkpoint, recipe, plans[0].device)


def _list_differences(steps_by_level: Mapping[str, Sequence[Step]]) -> dict[str, tuple[str, ...]]:
    """By level the settings in which it differs from another one."""
    all_steps = list(steps_by_level.values())
    num_schemes = len({step.scheme.name for step in all_steps[0]}) if all_steps else 0
    settings: dict[str, tuple[str, ...]] = {}
    for level, steps in steps_by_level.items():
        texts = []
        # the same step at every level
        for step, *same_step in zip(steps, *all_steps, strict=True):
            for name, value in attrs.asdict(step.options).items():
                if any(getattr(other.options, name) != value for other in same_step):
                    prefix = f"{step.scheme.name}." if num_schemes > 1 else ""
                    texts.append(f"{prefix}{name}={format_value(value)}")
        settings[level] = tuple(dict.fromkeys(texts))
    return settings
