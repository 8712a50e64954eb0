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

Rounded embeddings start such hidden states before the first block, and a rounded cache in it: its
scales are fitted to what the source's attentions keep of the other sequences. A rounded head makes
predictions of the source's own last hidden states.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitpress.checkpoint.reader import Reader
from bitpress.compression.calibration.activation_streams import ActivationStreams, StreamLimits
from bitpress.compression.calibration.fold import fold_scales
from bitpress.compression.calibration.layer_groups import BlockPlan, LayerGroup, order_layer_groups
from bitpress.compression.calibration.resumable_forward import Breakpoints
from bitpress.compression.calibration.solution import install, solve
from bitpress.compression.calibration.statistics import collect_statistics
from bitpress.compression.search.cache_trial import CacheTrial
from bitpress.compression.search.measurement_memory import MeasurementMemory
from bitpress.compression.search.predictions import Predictor, sum_divergences
from bitpress.compression.search.rounded_layer import round_layer
from bitpress.compression.search.search_job import Divergences, SearchJob, split_sequences
from bitpress.compression.search.units import CACHE, SearchUnit
from bitpress.errors import CheckpointError
from bitpress.modeling.attention import watched_attention
from bitpress.modeling.block_runner import BlockRunner, RunnableModel, build_decoder
from bitpress.modeling.capture import BlockCall, capture_inputs, open_head
from bitpress.modeling.decoder import DecoderOptions
from bitpress.modeling.metrics import Head
from bitpress.planning import memory_estimate
from bitpress.planning.layout import Stack
from bitpress.planning.recipe import EMBEDDINGS, HEAD
from bitpress.runtime import memory
from bitpress.runtime.lanes import Lanes
from bitpress.runtime.progress import ReportProgress, in_block
from bitpress.schemes.attention_cache import CacheQuantizer
from bitpress.schemes.values import StoredLayer

# The source with one unit compressed: names of the unit and of the candidate.
Trial = tuple[str, str]


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
    with (
        Reader(pinned=options.device.type != "cpu") as reader,
        torch.no_grad(),
        watched_attention(),
        memory.retain_freed_memory(),
        Lanes(limits.num_lanes) as lanes,
    ):
        model = RunnableModel(job.plan.source, reader, job.plan.container)
        report_progress(0, "building the model and running its embeddings")
        measurement = _Measurement(job, model, options, limits, lanes)
        num_blocks = len(measurement.runner)
        for index in range(num_blocks):
            measurement.run_block(index, in_block(report_progress, index, num_blocks))
            memory.release_freed_memory()
        report_progress(0, "comparing predictions")
        sums = measurement.compare_predictions()
    num_tokens = sum(batch.numel() for batch in measurement.judged)
    return _tabulate(job, {trial: total / num_tokens for trial, total in sums.items()})


class _Measurement:
    """The judged batches on their way through the source, and through every trial.

    Attributes:
        judged: token ids of these batches.
        runner: runs them, and before them those that candidates are fitted to.
    """

    def __init__(
        self,
        job: SearchJob,
        model: RunnableModel,
        options: DecoderOptions,
        limits: MeasurementMemory,
        lanes: Lanes,
    ) -> None:
        self._job, self._model, self._options, self._lanes = job, model, options, lanes
        fitted, self.judged = _split_batches(job)
        self._num_fitted = len(fitted)
        self.runner = BlockRunner(
            model, [*fitted, *self.judged], options, limits.folder, lanes=lanes
        )
        # numbers of the judged batches' hidden states: the source's, and those of each trial
        self._source_states = range(len(fitted), len(fitted) + len(self.judged))
        self._trials: dict[Trial, range] = {}
        # of trials of the embeddings, what each block is called with: some models make it of these
        self._own_calls: dict[Trial, list[list[BlockCall]]] = {}
        for trial, stack in _outer_trials(job, EMBEDDINGS):
            self._embed(trial, stack, limits.folder)
        self._cache_trial = CacheTrial(job.cache.caches if job.cache else (), job.plan)
        stream_limits = StreamLimits(limits.num_waiting, lanes=lanes)
        self._streams = ActivationStreams(self.runner.hidden_states, options.device, stream_limits)

    def _embed(self, trial: Trial, stack: Stack, folder: Path | None) -> None:
        """Begin a trial of the embeddings.

        Args:
            folder: where hidden states are kept; None keeps them in memory.
        """
        rounded = round_layer(self._model, stack, self._options.device)
        inputs = capture_inputs(build_decoder(rounded, self._options), self.judged, folder)
        states = self.runner.hidden_states
        self._trials[trial] = range(len(states), len(states) + len(self.judged))
        self._own_calls[trial] = inputs.calls
        for number in range(len(self.judged)):
            states.append(inputs.hidden_states[number])
        # embeddings take more than a block does
        memory.release_freed_memory()

    def run_block(self, index: int, report_progress: ReportProgress) -> None:
        """Run a block in all trials that have begun, and begin those of its units."""
        runner, calls = self.runner, self.runner.take_calls(index)
        fitting_calls, judging_calls = calls[: self._num_fitted], calls[self._num_fitted :]
        report_progress(0, f"running {len(self._trials)} trials")
        block = runner.load_block(index)
        for trial, states in self._trials.items():
            own_calls = self._own_calls.get(trial)
            runner.run(block, own_calls[index] if own_calls else judging_calls, states)
            if own_calls:
                # they are dropped with the block
                own_calls[index] = []

        units = [unit for unit in self._job.units if unit.block == index]
        for candidate in self._job.plans if units else ():
            self._streams.enter_block(runner.load_block(index), None, fitting_calls)
            block_plan = self._plan_block(index, units, candidate)
            compressed = _compress_in_turn(
                units, candidate, self._streams, block_plan, report_progress
            )
            for unit in compressed:
                self._trials[unit.name, candidate] = runner.fork(
                    self._streams.block, judging_calls, self._source_states
                )
                report_progress(unit.source_bytes, f"{candidate} · measured")

        quantizers: Mapping[str, CacheQuantizer] = {}
        if index + 1 < len(runner) or self._cache_trial.of_block(index):
            self._streams.enter_block(block, None, fitting_calls)
            quantizers = self._cache_trial.fit(index, self._streams)
            self._streams.leave_block()
        self._cache_trial.run_block(block, quantizers, runner, judging_calls, self._source_states)
        runner.run(block, judging_calls, self._source_states)

    def _plan_block(self, index: int, units: Sequence[SearchUnit], candidate: str) -> BlockPlan:
        plan = self._job.plan
        return BlockPlan(
            f"{plan.container}.{index}.",
            [stack for unit in units for stack in unit.stacks[candidate]],
            plan.head_dim,
            plan.source.entries,
            reader=self._model.reader,
        )

    def compare_predictions(self) -> dict[Trial, float]:
        """Σ KL divergence over the judged tokens of every trial from the source, in nats, once all
        blocks have been run.
        """
        runner, job = self.runner, self._job
        with open_head(runner.decoder, runner.extra_outputs) as head:
            source = self._predictor(self._source_states, head)
            models = {
                trial: self._predictor(states, head) for trial, states in self._trials.items()
            }
            for candidate in job.cache.trials if job.cache else ():
                states = self._cache_trial.states
                models[CACHE, candidate] = self._predictor(states, head)
            sums = self._compare(source, models)
            for trial, stack in _outer_trials(job, HEAD):
                sums |= self._compare_head(trial, stack, source)
        return sums

    def _compare(self, source: Predictor, models: Mapping[Trial, Predictor]) -> dict[Trial, float]:
        sums = sum_divergences(source, list(models.values()), len(self.judged), self._lanes)
        return dict(zip(models, sums, strict=True))

    def _compare_head(self, trial: Trial, stack: Stack, source: Predictor) -> dict[Trial, float]:
        # a head may take gigabytes, and may not fit into the hole that the one before has left
        memory.release_freed_memory()
        rounded = round_layer(self._model, stack, self._options.device)
        decoder = build_decoder(rounded, self._options)
        with open_head(decoder, self.runner.extra_outputs) as head:
            return self._compare(source, {trial: Predictor(source.tokens, head)})

    def _predictor(self, states: Sequence[int], head: Head) -> Predictor:
        """What predicts by a head what follows hidden states of the judged batches.

        Args:
            states: their numbers.
        """
        return Predictor(lambda batch: self.runner.tokens(states[batch]), head)


def _outer_trials(job: SearchJob, name: str) -> Iterator[tuple[Trial, Stack]]:
    """The trials of the head, or of the embeddings, and what becomes of that layer.

    Args:
        name: what a rule calls it.
    """
    for unit in job.units:
        for candidate in unit.trials if unit.patterns == (name,) else ():
            (stack,) = unit.stacks[candidate]
            yield (unit.name, candidate), stack


def _split_batches(job: SearchJob) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The batches that candidates are fitted to, and those that they are judged on."""
    ids = job.calibration.input_ids
    batch_size = max(memory_estimate.BATCH_TOKENS // ids.shape[1], 1)
    fitted, judged = (torch.split(part, batch_size) for part in split_sequences(ids))
    is_fitted = any(plan.calibrated for plan in job.plans.values())
    if not is_fitted and not (job.cache and job.cache.trials):
        # nothing is fitted to them: one shows how a forward goes
        fitted = fitted[:1]
    return fitted, judged


def _compress_in_turn(
    units: Sequence[SearchUnit],
    candidate: str,
    streams: ActivationStreams,
    block_plan: BlockPlan,
    report_progress: ReportProgress,
) -> Iterator[SearchUnit]:
    """One unit after another, while the block computes with it compressed and with all else as the
    source has it.

    Args:
        units: of the block that the streams stand before.
        block_plan: of their stacks.
        report_progress: is told which layer is compressed.
    """
    unit_of = {stack.name: unit for unit in units for stack in unit.stacks[candidate]}
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
        for unit in job.choices
        for candidate in unit.candidates
    }
