"""The command `search` as functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bitpress.checkpoint.hub import resolve
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.checkpoint.source import Source, resolve_source
from bitpress.checkpoint.writer import OutputFolder
from bitpress.compression.search.allocation import Option, choose_options
from bitpress.compression.search.candidates import NamedCandidates, read_candidates
from bitpress.compression.search.measurement_memory import plan_memory
from bitpress.compression.search.result import SearchResult, render_recipe
from bitpress.compression.search.search_job import SearchJob, split_sequences
from bitpress.compression.search.sensitivity import measure_divergences
from bitpress.compression.search.units import (
    CacheUnit,
    SearchUnit,
    find_cache_unit,
    find_outer_units,
    find_units,
)
from bitpress.errors import OutputError, RecipeError
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.modeling.tokens import load_calibration_data
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.plan import Plan
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe import Recipe, Rule
from bitpress.planning.rotation import rotate_source
from bitpress.planning.run_options import RunOptions
from bitpress.planning.search_goal import SearchGoal
from bitpress.runtime.devices import count_cores, find_device, torch_threads
from bitpress.runtime.progress import Progress, ignore_progress
from bitpress.schemes.registry import discover

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
    named = read_candidates(goal, discover())
    _require_tokens(goal, named)
    _require_new(Path(out))
    source = _open_source(model, named)
    plans = {
        name: make_plan(source, Recipe((Rule("*", steps),), goal.ignore))
        for name, steps in named.layers.items()
        if steps
    }
    units = find_units(plans, [name for name, steps in named.layers.items() if not steps])
    remarks: Sequence[str] = ()
    if goal.budget.num_bytes is not None:
        outer_units, remarks = find_outer_units(source, named.outer, goal.ignore)
        units += outer_units
    cache = None
    if goal.cache_tokens:
        cache = find_cache_unit(source, named.cache, goal.cache_tokens)
    plan = next(iter(plans.values()))
    other_bytes = _count_other_bytes(plan, units)
    max_bytes = _limit_bytes([*units, *([cache] if cache else [])], other_bytes, goal)
    # raises where the candidates cannot lie in one model
    make_plan(source, _mix_candidates(units, named))

    decoder_options = DecoderOptions(trust_remote_code=options.trust_remote_code)
    with Reader() as reader:
        Decoder(plan.source, plan.container, reader, decoder_options).require_parameters()
    data = load_calibration_data(
        calibration, source.folder, source.config, options.trust_remote_code
    )
    return SearchJob(
        str(model),
        named.layers,
        plans,
        tuple(units),
        cache,
        goal.budget,
        other_bytes,
        max_bytes,
        data,
        (*named.notes, *remarks),
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

    knapsack = [
        [Option(unit.num_bytes(name), divergences[unit.name, name]) for name in unit.candidates]
        for unit in job.choices
    ]
    numbers = choose_options(knapsack, job.max_bytes)
    choice = {unit.name: unit.candidates[i] for unit, i in zip(job.choices, numbers, strict=True)}
    _, judged = split_sequences(job.calibration.input_ids)
    result = SearchResult(job, choice, divergences, judged.numel())
    OutputFolder(folder).write_text(Path(out).name, render_recipe(result))
    return result


def _open_source(model: str | Path, named: NamedCandidates) -> Source:
    """The model in which candidates are compared and mixed: rotated, where one of them asks for
    that.
    """
    source = resolve_source(open_checkpoint(resolve(model)))
    return rotate_source(source) if named.rotates else source


def _require_new(out: Path) -> None:
    """Raise OutputError unless a file can be written that is not there yet."""
    if out.exists():
        raise OutputError(f"{out} is there already: name another file (--out)")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out}: there is no such folder to write it into")


def _require_tokens(goal: SearchGoal, named: NamedCandidates) -> None:
    """Raise RecipeError unless a budget in bytes says for how many tokens a cache is chosen."""
    if goal.cache_tokens < 0:
        raise RecipeError(f"--cache-tokens {goal.cache_tokens}: it is not 1 or more")
    is_in_bytes = goal.budget.num_bytes is not None
    if goal.cache_tokens and not is_in_bytes:
        raise RecipeError(
            f"--budget {goal.budget.text}: bits of weights say nothing of a cache: give a size, "
            "such as --budget 4GB, or leave --cache-tokens out"
        )
    for name in named.cache if not goal.cache_tokens else ():
        raise RecipeError(
            f"--schemes {name}: it is for the cache: give a budget for weights and cache, and the "
            "tokens in it, such as --budget 4GB --cache-tokens 8192"
        )


def _count_other_bytes(plan: Plan, units: Sequence[SearchUnit]) -> int:
    """Bytes of the weights that no candidate is chosen for."""
    chosen = {f"{module}.weight" for unit in units for module in unit.modules}
    copies = (entry for shard in plan.shards for entry in shard.copies)
    return sum(entry.nbytes for entry in copies if entry.name not in chosen)


def _limit_bytes(
    choices: Sequence[SearchUnit | CacheUnit], other_bytes: int, goal: SearchGoal
) -> int:
    """How many bytes a choice may have of all that is chosen for; raises RecipeError where none
    keeps to the budget.
    """
    budget, names = goal.budget, ", ".join(dict.fromkeys(goal.schemes))
    extremes = [
        sum(extreme(map(unit.num_bytes, unit.candidates)) for unit in choices)
        for extreme in (min, max)
    ]
    if budget.num_bytes is not None:
        smallest, largest = (other_bytes + size for size in extremes)
        if smallest > budget.num_bytes:
            cache = f" with the cache of {goal.cache_tokens:,} tokens" if goal.cache_tokens else ""
            raise RecipeError(
                f"--budget {budget.text}: by {names} the model takes from {smallest:,} to "
                f"{largest:,} bytes{cache}; give more, or a smaller scheme"
            )
        return budget.num_bytes - other_bytes
    assert budget.bits is not None
    num_weights = sum(unit.num_weights for unit in choices if isinstance(unit, SearchUnit))
    min_bits, max_bits = (8 * size / num_weights for size in extremes)
    # NaN keeps to nothing
    if not round(min_bits, 2) <= budget.bits:
        raise RecipeError(
            f"--budget {budget.text}: {names} take from {min_bits:.2f} to {max_bits:.2f} "
            "bits per weight, scales included; give more, or a smaller scheme"
        )
    return int((min(budget.bits, max_bits) + BUDGET_ROUNDING) * num_weights / 8)


def _mix_candidates(units: Sequence[SearchUnit], named: NamedCandidates) -> Recipe:
    """All candidates in one model, in turn; head, embeddings and cache compressed."""
    rules = []
    for i, unit in enumerate(units):
        names = unit.candidates if unit.block is not None else unit.trials
        stack, *_ = unit.stacks[names[i % len(names)]]
        rules += [Rule(pattern, stack.steps) for pattern in unit.patterns]
    return Recipe(tuple(rules), cache=next(iter(named.cache.values()), None))
