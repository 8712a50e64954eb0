"""What each choice costs: the KL divergence that one unit, compressed alone, causes in a model that
is otherwise the source.

With p(. | t) what the source expects to follow token t, and q[u, c] the same of the source with
unit u compressed by candidate c, and nothing else,

    D[u, c] = 1/T Σ_t Σ_v p(v | t) (log p(v | t) - log q[u, c](v | t))

over the T tokens that candidates are judged on and the v of the vocabulary. The search takes the
cost of a recipe for the sum of the D[u, c(u)] of its units, as mixed-precision searches do (HAWQ,
https://arxiv.org/abs/1905.03696, with the Hessian's eigenvalues in place of a divergence);
docs/recipes.md says how far that holds.

The model is gone through once, one block in memory at a time. Most sequences serve to fit
candidates, as in a calibrated run; the others, which no candidate has seen, to judge them. In each
block every candidate compresses every unit in turn; the hidden states that the block then makes of
the judged sequences go on through the source's other blocks beside the source's own, and after the
last one their predictions are compared. That is exact, and takes as many forwards of a block as
there are units, candidates and blocks after them, for the judged tokens.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitpress.checkpoint.reader import Reader
from bitpress.compression.calibration.activation_streams import ActivationStreams, StreamLimits
from bitpress.compression.calibration.fold import fold_scales
from bitpress.compression.calibration.layer_groups import BlockPlan, LayerGroup, order_layer_groups
from bitpress.compression.calibration.resumable_forward import Breakpoints
from bitpress.compression.calibration.solution import install, solve
from bitpress.compression.calibration.statistics import collect_statistics
from bitpress.compression.search.candidates import SearchUnit
from bitpress.compression.search.measurement_memory import MeasurementMemory
from bitpress.compression.search.search_job import Divergences, SearchJob, split_sequences
from bitpress.errors import CheckpointError
from bitpress.modeling import metrics
from bitpress.modeling.block_runner import BlockRunner, RunnableModel
from bitpress.modeling.capture import open_head
from bitpress.modeling.decoder import DecoderOptions
from bitpress.modeling.metrics import Head
from bitpress.planning import memory_estimate
from bitpress.runtime import memory
from bitpress.runtime.lanes import Lanes
from bitpress.runtime.progress import ReportProgress, in_block
from bitpress.schemes.values import StoredLayer

# Trials whose predictions are compared with the source's while those are in memory.
TRIALS_TOGETHER = 8


def measure_divergences(
    job: SearchJob,
    options: DecoderOptions,
    limits: MeasurementMemory,
    report_progress: ReportProgress,
) -> Divergences:
    """What every candidate costs every unit, D[u, c].

    Args:
        report_progress: is given the bytes of every unit's source, once for each candidate.

    Raises:
        CheckpointError: transformers cannot build the model, or it makes numbers that are not
            finite.
    """
    fitted, judged = _split_batches(job)
    with (
        Reader(pinned=options.device.type != "cpu") as reader,
        torch.no_grad(),
        memory.retain_freed_memory(),
        Lanes(limits.num_lanes) as lanes,
    ):
        model = RunnableModel(job.plan.source, reader, job.plan.container)
        report_progress(0, "building the model and running its embeddings")
        runner = BlockRunner(model, [*fitted, *judged], options, limits.folder, lanes=lanes)
        # numbers of the judged batches' hidden states: the source's, and those of each trial
        source_states = range(len(fitted), len(fitted) + len(judged))
        trials: dict[tuple[str, str], range] = {}
        stream_limits = StreamLimits(limits.num_waiting, lanes=lanes)
        streams = ActivationStreams(runner.hidden_states, options.device, stream_limits)

        for index in range(len(runner)):
            calls = runner.take_calls(index)
            fitting_calls, judging_calls = calls[: len(fitted)], calls[len(fitted) :]
            report_block = in_block(report_progress, index, len(runner))
            report_block(0, f"running {len(trials)} trials")
            block = runner.load_block(index)
            for trial_states in trials.values():
                runner.run(block, judging_calls, trial_states)

            units = [unit for unit in job.units if unit.block == index]
            for candidate in job.plans if units else ():
                streams.enter_block(runner.load_block(index), None, fitting_calls)
                for unit in _compress_in_turn(units, candidate, streams, job, report_block):
                    trials[unit.name, candidate] = runner.fork(
                        streams.block, judging_calls, source_states
                    )
                    num_bytes = sum(stack.source_bytes for stack in unit.stacks[candidate])
                    report_block(num_bytes, f"{candidate} · measured")

            if index + 1 < len(runner):
                streams.enter_block(block, None, fitting_calls)
                streams.leave_block()
            runner.run(block, judging_calls, source_states)
            memory.release_freed_memory()
        report_progress(0, "comparing predictions")
        sums = _compare_trials(runner, source_states, list(trials.values()), lanes)
    num_tokens = sum(batch.numel() for batch in judged)
    return _tabulate(job, {trial: x / num_tokens for trial, x in zip(trials, sums, strict=True)})


def _split_batches(job: SearchJob) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The batches that candidates are fitted to, and those that they are judged on."""
    ids = job.calibration.input_ids
    batch_size = max(memory_estimate.BATCH_TOKENS // ids.shape[1], 1)
    fitted, judged = (torch.split(part, batch_size) for part in split_sequences(ids))
    stacks = [stack for candidate in job.plans for stack in job.units[0].stacks[candidate]]
    if not any(stack.calibrated for stack in stacks):
        # nothing is fitted to them: one shows how a forward goes
        fitted = fitted[:1]
    return fitted, judged


def _compress_in_turn(
    units: Sequence[SearchUnit],
    candidate: str,
    streams: ActivationStreams,
    job: SearchJob,
    report_progress: ReportProgress,
) -> Iterator[SearchUnit]:
    """One unit after another, while the block computes with it compressed and with all else as the
    source has it.

    Args:
        units: of the block that the streams stand before.
        report_progress: is told which layer is compressed.
    """
    unit_of = {stack.name: unit for unit in units for stack in unit.stacks[candidate]}
    block_plan = BlockPlan(
        f"{job.plan.container}.{units[0].block}.",
        [stack for unit in units for stack in unit.stacks[candidate]],
        job.plan.head_dim,
        job.plan.source.entries,
    )
    groups = order_layer_groups(block_plan, streams)
    fold_scales(groups, block_plan, streams)
    first_layers = [group.first_layer for group in groups if group.first_layer is not None]
    breakpoints = Breakpoints(streams.block, first_layers)
    for group in groups:
        group.register_input_quantizers()

    # a unit may have several stacks: it is compressed once all of them have been solved
    num_unsolved = {unit.name: len(unit.stacks[candidate]) for unit in units}
    solved: dict[str, list[tuple[LayerGroup, Sequence[StoredLayer]]]]
    solved = {unit.name: [] for unit in units}
    for number, group in enumerate(groups):
        unit = unit_of[group.stack.name]
        layer = group.stack.short_name.removeprefix(block_plan.prefix)
        report_progress(0, f"{layer} · {candidate}")
        solved[unit.name].append((group, _solve(group, number, streams)))
        num_unsolved[unit.name] -= 1
        if num_unsolved[unit.name]:
            continue
        solved_groups = solved.pop(unit.name)
        source_weights = [
            (weight, weight.clone())
            for solved_group, _ in solved_groups
            for weight in solved_group.parameters.values()
        ]
        for solved_group, stored_layers in solved_groups:
            install(stored_layers, solved_group)
        yield unit
        for weight, source_weight in source_weights:
            weight.copy_(source_weight)
        for other in groups:
            other.input_quantizers.clear()
    breakpoints.remove()


def _solve(group: LayerGroup, number: int, streams: ActivationStreams) -> Sequence[StoredLayer]:
    """What a run would store of a layer group."""
    with warnings.catch_warnings():
        # `compress` warns of the same
        warnings.simplefilter("ignore", UserWarning)
        statistics = collect_statistics(group, number, streams)
        solution = solve(group, statistics, streams.limits)
    return solution.stored_layers


def _tabulate(job: SearchJob, measured: Divergences) -> Divergences:
    """What every candidate costs every unit, of what has been measured of those that compress."""
    if not all(map(math.isfinite, measured.values())):
        raise CheckpointError(
            f"{job.plan.source.folder}: the model makes NaN or infinity of the calibration text; "
            "check its weights"
        )
    return {
        # a divergence is below 0 only by rounding; layers that stay as they are cost nothing
        (unit.name, candidate): max(measured.get((unit.name, candidate), 0.0), 0.0)
        for unit in job.units
        for candidate in unit.stacks
    }


def _compare_trials(
    runner: BlockRunner,
    source_states: Sequence[int],
    trials: Sequence[Sequence[int]],
    lanes: Lanes,
) -> list[float]:
    """Σ KL divergence over tokens of each trial from the source, in nats.

    Args:
        source_states: by judged batch the number of the source's last hidden states.
        trials: the same of each trial.
        lanes: trials are compared side by side in these.
    """
    sums = [0.0] * len(trials)
    firsts = range(0, len(trials), TRIALS_TOGETHER)
    with open_head(runner.decoder, runner.extra_outputs) as head:

        def compare(batch: int, first: int) -> list[float]:
            together = trials[first : first + TRIALS_TOGETHER]
            numbers = [source_states[batch], *(trial[batch] for trial in together)]
            hidden_states = [runner.tokens(number) for number in numbers]
            return _sum_divergences(head, hidden_states)

        pairs = list(itertools.product(range(len(source_states)), firsts))
        results = lanes.map(lambda pair: compare(*pair), pairs)
        for (_, first), divergences in zip(pairs, results, strict=True):
            for trial, divergence in enumerate(divergences, first):
                sums[trial] += divergence
    return sums


def _sum_divergences(head: Head, hidden_states: Sequence[Tensor]) -> list[float]:
    """Σ KL divergence over tokens of every model from the first, in nats.

    Args:
        hidden_states: of each model the last ones, (tokens, channels).
    """
    sums = [0.0] * (len(hidden_states) - 1)
    heads = [head] * len(hidden_states)
    for _, _, models in metrics.compare_logits([hidden_states], heads):
        log_p = next(models)
        for i, log_q in enumerate(models):
            sums[i] += metrics.kl_divergence(log_p, log_q)
    return sums
