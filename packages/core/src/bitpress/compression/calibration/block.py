"""One decoder block: scales are folded, then its layer groups are compressed in forward order."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from attrs import evolve, frozen
from torch import Tensor

from bitpress.compression.calibration.activation_streams import ActivationStreams
from bitpress.compression.calibration.block_result import BlockResult
from bitpress.compression.calibration.cache_statistics import CacheObserver
from bitpress.compression.calibration.fold import FoldResult, fold_scales
from bitpress.compression.calibration.layer_groups import (
    BlockPlan,
    LayerGroup,
    order_layer_groups,
    side_by_side,
)
from bitpress.compression.calibration.resumable_forward import Breakpoints
from bitpress.compression.calibration.solution import (
    Solution,
    broadcast_stored,
    install,
    solve_side_by_side,
)
from bitpress.compression.calibration.statistics import (
    GroupStatistics,
    collect_statistics,
    warn_of_few_tokens,
)
from bitpress.runtime import memory
from bitpress.runtime.logger import logger
from bitpress.runtime.progress import ReportProgress

WriteTensor = Callable[[str, Tensor], None]


@frozen
class _GroupResult:
    """What compressing a layer group has measured; attributes as a `BlockResult` has them."""

    output_errors: Mapping[str, float]
    warnings: Sequence[str]
    num_tokens: Mapping[str, int]
    rounding_errors: Mapping[str, float]


@frozen(eq=False)
class _Collected:
    """What is known of a layer group before it is solved.

    Attributes:
        owner: the rank that solves it.
        statistics: of its inputs; of steps, the owner's alone.
        warnings: of its inputs, one line each.
    """

    owner: int
    statistics: GroupStatistics
    warnings: Sequence[str]


def compress_block(
    block_plan: BlockPlan,
    streams: ActivationStreams,
    write_tensor: WriteTensor,
    report_progress: ReportProgress,
) -> BlockResult:
    """Compress a block's layer groups in the order in which its forward pass comes to them.

    A group's inputs are those that the compressed groups before it make; the block computes with
    what is stored afterwards.

    Args:
        streams: that stand before the block.
        write_tensor: is given every stored tensor by name.
    """
    report_progress(0, "tracing")
    groups = order_layer_groups(block_plan, streams)
    report_progress(0, "choosing scales")
    fold_result = fold_scales(groups, block_plan, streams)
    # after the forward passes that check what was folded
    cache_observer = CacheObserver(block_plan, streams)
    groups = _drop_old_gradients(groups, fold_result)

    first_layers = [group.first_layer for group in groups if group.first_layer is not None]
    residual_layers = [
        group.first_layer for group in groups if group.first_layer and group.is_residual
    ]
    breakpoints = [
        Breakpoints(block, first_layers, residual_layers)
        for block in (streams.block, streams.source_block)
        if block is not None
    ]
    # after the breakpoints: a group's inputs are observed before they are quantized
    for group in groups:
        group.register_input_quantizers()

    results: list[_GroupResult] = []
    for together in side_by_side(groups, streams.block):
        start = time.monotonic()
        own = _compress_groups(
            together, len(results), streams, write_tensor, _reporting(report_progress, block_plan)
        )
        results += own
        seconds = time.monotonic() - start
        for group, result in zip(together, own, strict=True):
            name = group.stack.short_name.removeprefix(block_plan.prefix)
            report_progress(group.stack.source_bytes, f"{name} · done")
            _log_errors(group, result, seconds / len(together))
        memory.release_freed_memory(streams.limits.max_working_bytes)
    for block_breakpoints in breakpoints:
        block_breakpoints.remove()

    for name, tensor in cache_observer.finish().items():
        write_tensor(name, tensor)
    return _join_results(fold_result, results)


def _drop_old_gradients(groups: Sequence[LayerGroup], fold_result: FoldResult) -> list[LayerGroup]:
    """The groups without statistics of gradients where scales were folded into the rows that make
    their outputs: these were taken before.
    """
    rescaled_rows = {name for name, axes in fold_result.rescaled.items() if "rows" in axes}
    return [
        evolve(group, gradient_statistics=())
        if any(f"{name}.weight" in rescaled_rows for name in group.modules)
        else group
        for group in groups
    ]


def _join_results(fold_result: FoldResult, results: Sequence[_GroupResult]) -> BlockResult:
    num_tokens = {name: count for result in results for name, count in result.num_tokens.items()}
    return BlockResult(
        {name: error for result in results for name, error in result.output_errors.items()},
        fold_result.rescaled,
        [
            *fold_result.warnings,
            *(text for result in results for text in result.warnings),
            *warn_of_few_tokens(num_tokens),
        ],
        num_tokens,
        rounding_errors={
            name: error for result in results for name, error in result.rounding_errors.items()
        },
    )


def _reporting(
    report_progress: ReportProgress, block_plan: BlockPlan
) -> Callable[[LayerGroup, str], None]:
    """What says what is being done to a layer group."""

    def say(group: LayerGroup, activity: str) -> None:
        name = group.stack.short_name.removeprefix(block_plan.prefix)
        report_progress(0, f"{name} · {activity}")

    return say


def _log_errors(group: LayerGroup, result: _GroupResult, seconds: float) -> None:
    for module in group.modules:
        error = result.output_errors.get(module)
        text = "no output error" if error is None else f"output error {error:.5f}"
        logger.debug("%s: %s, %.2f s", module, text, seconds)


def _compress_groups(
    groups: Sequence[LayerGroup],
    first_number: int,
    streams: ActivationStreams,
    write_tensor: WriteTensor,
    say_activity: Callable[[LayerGroup, str], None],
) -> list[_GroupResult]:
    """Compress layer groups that wait for none of each other: each is solved by one rank, and
    installed by all.

    Args:
        first_number: of the first group in forward order, and of its breakpoint.
        say_activity: is told what is being done.
    """
    process_group = streams.process_group
    collected = []
    for number, group in enumerate(groups, first_number):
        say_activity(group, "running")
        collected.append(_collect(group, number, streams))
        # what collecting has freed: what is allocated now is larger, and would not fit into its
        # holes
        memory.release_freed_memory(streams.limits.max_working_bytes)

    own = [number for number, known in enumerate(collected) if known.owner == process_group.rank]
    solutions: dict[int, Solution] = {}
    with process_group.agreeing():
        for number in own[:1]:
            say_activity(groups[number], "fitting")
        problems = [(groups[number], collected[number].statistics) for number in own]
        solutions.update(zip(own, solve_side_by_side(problems, streams.limits), strict=True))

    results = []
    for number, (group, known) in enumerate(zip(groups, collected, strict=True)):
        say_activity(group, "writing")
        results.append(
            _install_solution(group, known, solutions.get(number), streams, write_tensor)
        )
    return results


def _collect(group: LayerGroup, number: int, streams: ActivationStreams) -> _Collected:
    """What is known of a layer group before it is solved."""
    owner = number % streams.process_group.world_size
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        statistics = collect_statistics(group, number, streams, owner)
    texts = [str(warning.message) for warning in caught if warning.category is UserWarning]
    return _Collected(owner, statistics, texts)


def _install_solution(
    group: LayerGroup,
    known: _Collected,
    solution: Solution | None,
    streams: ActivationStreams,
    write_tensor: WriteTensor,
) -> _GroupResult:
    """Write what is stored of a group, and let the block compute with it.

    Args:
        solution: None on every rank but the group's owner.
    """
    process_group, statistics = streams.process_group, known.statistics
    own_errors = {} if solution is None else solution.rounding_errors
    rounding_errors = process_group.broadcast_object(own_errors, known.owner)
    texts = [*known.warnings, *(() if solution is None else solution.warnings)]
    by_rank = process_group.all_gather_object(texts)
    name = group.stack.name
    group_warnings = [
        f"{name}: {text}" for text in dict.fromkeys(text for texts in by_rank for text in texts)
    ]
    group_warnings += _warn_of_input_and_weights(group, statistics.num_tokens)

    solved_here = None if solution is None else solution.stored_layers
    stored_layers = broadcast_stored(solved_here, group, process_group, known.owner)
    for module, stored in zip(group.modules, stored_layers, strict=True):
        for suffix, tensor in stored.tensors.items():
            write_tensor(f"{module}.{suffix}", tensor)
    with process_group.agreeing():
        output_errors = install(stored_layers, group, statistics.sample)

    num_tokens = {}
    if group.is_routed and group.stack.calibrated:
        num_tokens = dict.fromkeys(group.modules, statistics.num_tokens)
    return _GroupResult(output_errors, group_warnings, num_tokens, rounding_errors)


def _warn_of_input_and_weights(group: LayerGroup, num_tokens: int) -> Iterator[str]:
    """A warning where nothing has come to a group that needs data, and for every layer of zeros.

    Experts are warned of once for the block.
    """
    if group.stack.calibrated and not group.is_routed and not num_tokens:
        yield (
            f"{group.stack.name}: no token of the calibration data reached it; it was rounded "
            "without data"
        )
    for name, weight in group.weights.items():
        if not weight.any():
            yield f"{name}: all its weights are zero"
