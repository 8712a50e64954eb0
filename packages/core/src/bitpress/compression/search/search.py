"""The command `search` as functions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bitpress.checkpoint.hub import resolve
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.checkpoint.writer import OutputFolder
from bitpress.compression.search.allocation import Option, choose
from bitpress.compression.search.candidates import Unit, units
from bitpress.compression.search.result import Found, Search, text
from bitpress.compression.search.sensitivity import Room, measure, parts
from bitpress.errors import OutputError, RecipeError
from bitpress.modeling import block_runner
from bitpress.modeling.decoder import Decoder
from bitpress.modeling.tokens import load
from bitpress.output import evaluate
from bitpress.planning import memory_estimate, recipe
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe import Recipe, Rule
from bitpress.planning.run_options import RunOptions
from bitpress.planning.search_goal import SearchGoal
from bitpress.runtime import memory
from bitpress.runtime.devices import cores, device_named, torch_threads
from bitpress.runtime.progress import Progress, quiet
from bitpress.schemes.registry import Step, discover

# The candidate that leaves layers as they are.
PLAIN = "none"

# Bits per weight: a budget is kept to the two decimals that tables show.
ROUNDING = 0.005

# Sequences of calibration data, unless the user asks for another number.
SAMPLES = 64


def prepare_search(
    model: str | Path,
    out: str | Path,
    goal: SearchGoal,
    calibration: CalibrationConfig,
    options: RunOptions,
) -> Search:
    """What headers can refuse is refused before texts are read."""
    names = tuple(dict.fromkeys(goal.schemes))
    if len(names) < 2:
        raise RecipeError(
            f"--schemes {','.join(names)}: name two or more to choose from ({PLAIN} leaves layers "
            "as they are)"
        )
    if Path(out).exists():
        raise OutputError(f"{out} is there already: name another file (--out)")
    if not Path(out).absolute().parent.is_dir():
        raise OutputError(f"{out}: there is no such folder to write it into")

    source = open_checkpoint(resolve(model))
    candidates = _read_candidates(names, goal.settings)
    plans = {
        name: make_plan(source, Recipe((Rule("*", steps),), goal.ignore))
        for name, steps in candidates.items()
        if steps
    }
    choices = units(plans, [name for name, steps in candidates.items() if not steps])
    limit = _limit(choices, names, goal.budget)
    # raises where the candidates cannot lie in one model
    make_plan(source, _mixed(choices, candidates))

    plan = next(iter(plans.values()))
    with Reader() as reader:
        Decoder(
            plan.source,
            plan.container,
            reader,
            torch.device("cpu"),
            torch.float32,
            options.trust_remote_code,
        ).require()
    sequences = load(calibration, source.folder, source.config, options.trust_remote_code)
    return Search(str(model), candidates, plans, tuple(choices), goal.budget, limit, sequences)


def run_search(
    job: Search, out: str | Path, options: RunOptions, progress: Progress = quiet
) -> Found:
    """Measure what each candidate costs each unit, and write the best choice as a recipe file."""
    device = device_named(options.device)
    room = _room(job, Path(out).absolute().parent, options.max_memory)
    names = list(job.candidates)

    num_bytes = len(job.plans) * sum(stack.source_bytes for stack in job.plan.stacks)
    with torch_threads(options.num_threads or cores()):
        damages = measure(
            job.plan,
            job.units,
            job.data,
            device,
            room,
            options.trust_remote_code,
            progress("measuring", num_bytes),
        )

    knapsack = [
        [Option(unit.size(name), damages[unit.name, name]) for name in names] for unit in job.units
    ]
    choices = zip(job.units, choose(knapsack, job.limit), strict=True)
    chosen = {unit.name: names[i] for unit, i in choices}
    result = Found(job, chosen, damages, parts(job.data.ids)[1].numel())
    OutputFolder(Path(out).absolute().parent).write_text(Path(out).name, text(result))
    return result


def _read_candidates(names: Sequence[str], settings: Sequence[str]) -> dict[str, tuple[Step, ...]]:
    """The steps of every candidate, by its name."""
    table = {"layers": [{"match": "*", "steps": _steps(name)} for name in names]}
    rules = recipe.from_json(table, discover(), "--schemes", settings).rules
    return {name: rule.steps for name, rule in zip(names, rules, strict=True)}


def _steps(candidate: str) -> list[dict[str, str]]:
    """The steps of a candidate, as a recipe has them."""
    steps = []
    for step in candidate.split("+") if candidate != PLAIN else ():
        name, *settings = step.split(":")
        pairs = [setting.partition("=") for setting in settings]
        if not all(equals for _, equals, _ in pairs):
            raise RecipeError(
                f"--schemes {candidate}: options are given as NAME:OPTION=VALUE:OPTION=VALUE"
            )
        steps.append({"use": name} | {option: value for option, _, value in pairs})
    return steps


def _limit(units: Sequence[Unit], names: Sequence[str], budget: float) -> int:
    """The bytes of a budget; raises RecipeError where no choice keeps to it."""
    weights = sum(unit.weights for unit in units)
    least, most = (
        8 * sum(ends(map(unit.size, names)) for unit in units) / weights for ends in (min, max)
    )
    if not round(least, 2) <= budget:
        raise RecipeError(
            f"--budget {budget:g}: {', '.join(names)} take from {least:.2f} to {most:.2f} bits per "
            "weight, scales included; give more, or a smaller scheme"
        )
    return int((min(budget, most) + ROUNDING) * weights / 8)


def _mixed(units: Sequence[Unit], candidates: Mapping[str, tuple[Step, ...]]) -> Recipe:
    """All candidates in one model, in turn."""
    steps = list(candidates.values())
    return Recipe(
        tuple(Rule(p, steps[i % len(steps)]) for i, unit in enumerate(units) for p in unit.patterns)
    )


def _room(job: Search, folder: Path, max_memory: int | None) -> Room:
    """Where hidden states are kept: in memory, or in that folder.

    Raises:
        BitpressError: there is no room for them, or the limit, in bytes, is too low in any case.
    """
    with Reader() as reader:
        subject = block_runner.plain(job.plan.source, reader, job.plan.container)
        # a block as it was, and as it becomes
        needs = [2 * evaluate.need(subject, None, 0)[0]]
    estimates = [
        memory_estimate.estimate_calibration(plan, 0)
        for plan in job.plans.values()
        if plan.recipe.calibrated
    ]
    least = memory.TRANSFORMERS_BYTES + max(needs + [estimate.on_disk for estimate in estimates])
    if max_memory is not None and max_memory < least:
        raise RecipeError(
            f"the search needs about {least / 1e6:,.0f} MB of memory, more than the "
            f"{max_memory / 1e6:,.0f} MB allowed"
        )
    fitted, judged = (ids.numel() for ids in parts(job.data.ids))
    states = (
        memory_estimate.NUMBER_BYTES
        * job.plan.hidden_size
        * (fitted + judged * (1 + len(job.plans) * len(job.units)))
    )
    allowed = (
        memory.TRANSFORMERS_BYTES + memory.available() // 2 if max_memory is None else max_memory
    )
    waiting = max(
        (
            estimate.num_waiting(
                allowed - least - states + estimate.in_memory, memory_estimate.BATCH_TOKENS
            )
            for estimate in estimates
        ),
        default=0,
    )
    if least + states <= allowed:
        return Room(None, waiting)
    if (free := shutil.disk_usage(folder).free) < states:
        raise OutputError(
            f"{folder}: {states / 1e9:.2f} GB of hidden states go there, and {free / 1e9:.2f} GB "
            "are free"
        )
    return Room(folder, waiting)
