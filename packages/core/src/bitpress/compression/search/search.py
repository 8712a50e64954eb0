"""The command `search` as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bitpress.checkpoint.hub import resolve
from bitpress.checkpoint.reader import Checkpoint, Reader, open_checkpoint
from bitpress.checkpoint.source import resolve_source
from bitpress.checkpoint.writer import OutputFolder
from bitpress.compression.search.allocation import Option, choose_options
from bitpress.compression.search.candidates import SearchUnit, find_units
from bitpress.compression.search.measurement_memory import plan_memory
from bitpress.compression.search.result import SearchResult, render_recipe
from bitpress.compression.search.search_job import SearchJob, split_sequences
from bitpress.compression.search.sensitivity import measure_divergences
from bitpress.errors import OutputError, RecipeError
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.modeling.tokens import load_calibration_data
from bitpress.planning import recipe
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe import Recipe, RecipeChanges, Rule
from bitpress.planning.rotation import rotate_source
from bitpress.planning.run_options import RunOptions
from bitpress.planning.search_goal import SearchGoal
from bitpress.runtime.devices import count_cores, find_device, torch_threads
from bitpress.runtime.progress import Progress, ignore_progress
from bitpress.schemes.registry import Step, discover

# The candidate that leaves layers as they are.
UNCOMPRESSED = "none"

# Bits per weight: a budget is kept to the two decimals that tables show.
BUDGET_ROUNDING = 0.005

# Sequences of calibration data, unless the user asks for another number.
NUM_SEQUENCES = 64


def prepare_search(
    model: str | Path,
    out: str | Path,
    goal: SearchGoal,
    calibration: CalibrationConfig,
    options: RunOptions,
) -> SearchJob:
    """Find what is to be chosen for; what headers can refuse is refused before texts are read.

    Raises:
        BitpressError: the model, a scheme or the texts cannot be used, no choice keeps to the
            budget, or `out` is there already.
    """
    names = tuple(dict.fromkeys(goal.schemes))
    if len(names) < 2:
        raise RecipeError(
            f"--schemes {','.join(names)}: name two or more to choose from ({UNCOMPRESSED} leaves "
            "layers as they are)"
        )
    if Path(out).exists():
        raise OutputError(f"{out} is there already: name another file (--out)")
    if not Path(out).absolute().parent.is_dir():
        raise OutputError(f"{out}: there is no such folder to write it into")

    candidate_recipe = _read_candidates(names, goal)
    source = _open_source(model, candidate_recipe)
    candidates = {
        name: rule.steps for name, rule in zip(names, candidate_recipe.rules, strict=True)
    }
    plans = {
        name: make_plan(source, Recipe((Rule("*", steps),), goal.ignore))
        for name, steps in candidates.items()
        if steps
    }
    units = find_units(plans, [name for name, steps in candidates.items() if not steps])
    max_bytes = _budget_bytes(units, names, goal.budget)
    # raises where the candidates cannot lie in one model
    make_plan(source, _mix_candidates(units, candidates))

    plan = next(iter(plans.values()))
    decoder_options = DecoderOptions(trust_remote_code=options.trust_remote_code)
    with Reader() as reader:
        Decoder(plan.source, plan.container, reader, decoder_options).require_parameters()
    data = load_calibration_data(
        calibration, source.folder, source.config, options.trust_remote_code
    )
    return SearchJob(
        str(model),
        candidates,
        plans,
        tuple(units),
        goal.budget,
        max_bytes,
        data,
        candidate_recipe.notes,
    )


def run_search(
    job: SearchJob, out: str | Path, options: RunOptions, progress: Progress = ignore_progress
) -> SearchResult:
    """Measure what each candidate costs each unit, and write the best choice as a recipe file."""
    folder = Path(out).absolute().parent
    device = find_device(options.device)
    num_threads = options.num_threads or count_cores()
    measurement_memory = plan_memory(job, folder, device, options.max_memory, num_threads)
    decoder_options = DecoderOptions(
        device,
        trust_remote_code=options.trust_remote_code,
        all_experts=job.calibration.all_experts,
        max_brought_bytes=measurement_memory.max_brought_bytes,
    )

    num_bytes = len(job.plans) * sum(stack.source_bytes for stack in job.plan.stacks)
    # on a CPU batches run side by side, each on one core
    with torch_threads(1 if device.type == "cpu" else num_threads):
        divergences = measure_divergences(
            job, decoder_options, measurement_memory, progress("measuring", num_bytes)
        )

    names = list(job.candidates)
    knapsack = [
        [Option(unit.num_bytes(name), divergences[unit.name, name]) for name in names]
        for unit in job.units
    ]
    numbers = choose_options(knapsack, job.max_bytes)
    choice = {unit.name: names[i] for unit, i in zip(job.units, numbers, strict=True)}
    _, judged = split_sequences(job.calibration.input_ids)
    result = SearchResult(job, choice, divergences, judged.numel())
    OutputFolder(folder).write_text(Path(out).name, render_recipe(result))
    return result


def _open_source(model: str | Path, candidate_recipe: Recipe) -> Checkpoint:
    """The model in which candidates are compared and mixed: rotated, where one of them asks for
    that.
    """
    source = open_checkpoint(resolve(model))
    return rotate_source(resolve_source(source)) if candidate_recipe.rotates else source


def _read_candidates(names: Sequence[str], goal: SearchGoal) -> Recipe:
    """A recipe with a rule for each candidate."""
    table = {"layers": [{"match": "*", "steps": _parse_steps(name)} for name in names]}
    changes = RecipeChanges(goal.settings, effort=goal.effort)
    return recipe.from_json(table, discover(), "--schemes", changes)


def _parse_steps(candidate: str) -> list[dict[str, str]]:
    """The steps of a candidate, as a recipe has them."""
    steps = []
    for step in candidate.split("+") if candidate != UNCOMPRESSED else ():
        name, *settings = step.split(":")
        pairs = [setting.partition("=") for setting in settings]
        if not all(equals for _, equals, _ in pairs):
            raise RecipeError(
                f"--schemes {candidate}: options are given as NAME:OPTION=VALUE:OPTION=VALUE"
            )
        steps.append({"use": name} | {option: value for option, _, value in pairs})
    return steps


def _budget_bytes(units: Sequence[SearchUnit], names: Sequence[str], budget: float) -> int:
    """The bytes of a budget in bits per weight; raises RecipeError where no choice keeps to it."""
    num_weights = sum(unit.num_weights for unit in units)
    min_bits, max_bits = (
        8 * sum(extreme(map(unit.num_bytes, names)) for unit in units) / num_weights
        for extreme in (min, max)
    )
    # NaN keeps to nothing
    if not round(min_bits, 2) <= budget:
        raise RecipeError(
            f"--budget {budget:g}: {', '.join(names)} take from {min_bits:.2f} to {max_bits:.2f} "
            "bits per weight, scales included; give more, or a smaller scheme"
        )
    return int((min(budget, max_bits) + BUDGET_ROUNDING) * num_weights / 8)


def _mix_candidates(
    units: Sequence[SearchUnit], candidates: Mapping[str, tuple[Step, ...]]
) -> Recipe:
    """All candidates in one model, in turn."""
    steps = list(candidates.values())
    rules = [
        Rule(pattern, steps[i % len(steps)])
        for i, unit in enumerate(units)
        for pattern in unit.patterns
    ]
    return Recipe(tuple(rules))
