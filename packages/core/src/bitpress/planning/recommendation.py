"""Which scheme to take for a model on a device: from plans, from what schemes say of the device,
and from losses that were measured.

Every scheme is planned with its defaults, and with the options of which it declares a measured
loss; at another level of effort than the normal one with the options of that level, and with those
of the losses that go with them. What cannot be planned, what the device does not run, what is too
large for its memory and what makes nothing smaller is out. The others are ranked: first what is no
fallback on the device; then what computes in the format, and not in 16 bits; then by the level that
the scheme gives the device; then what needs no calibration data; then by the measured loss, in
which less than a factor of two counts as nothing; then by whole bits per weight; then by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from attrs import field, frozen

from bitpress.checkpoint.reader import Checkpoint
from bitpress.errors import BitpressError, CheckpointError, RecipeError
from bitpress.planning import memory_estimate, tensor_parallel, time_estimate
from bitpress.planning.plan import Plan
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe import Recipe, Rule
from bitpress.runtime.devices import count_cores
from bitpress.runtime.memory import format_bytes
from bitpress.schemes.hardware import Hardware, detect_device
from bitpress.schemes.options import format_value
from bitpress.schemes.registry import NO_SCHEMES, Registry, Scheme, Step
from bitpress.schemes.values import NORMAL_EFFORT, NOTHING_KNOWN, Finding, MeasuredLoss

# The share of a device's memory that weights and cache may take. vLLM takes 0.92 by default
# (--gpu-memory-utilization), for activations too.
MEMORY_SHARE = 0.9

# Levels of findings, best first.
LEVELS = ("recommended", "supported", "degraded", "unsupported")

# Bytes of a number in the cache of keys and values, unless it is quantized too.
CACHE_NUMBER_BYTES = 2


@frozen
class Variant:
    """A scheme with options, or several in a row.

    Attributes:
        steps: in order.
        options: by scheme, those that differ from the defaults.
        losses: that were measured with exactly these.
    """

    steps: tuple[Step, ...] = field(repr=False)
    options: Mapping[str, Mapping[str, Any]]
    losses: tuple[MeasuredLoss, ...] = ()

    @property
    def scheme(self) -> str:
        """As `--scheme` takes it: the names, joined by `+`."""
        return "+".join(step.scheme.name for step in self.steps)

    @property
    def settings(self) -> tuple[str, ...]:
        """As `--set` takes the options."""
        has_several = len(self.steps) > 1
        return tuple(
            f"{f'{scheme}.' if has_several else ''}{name}={format_value(value)}"
            for scheme, options in self.options.items()
            for name, value in options.items()
        )


@frozen
class Alternative:
    """A variant that fits and that the device runs.

    Attributes:
        level: the worst of what its schemes say of the device, and `reason` the sentence to it.
        num_bytes: of the weight files, and so of the weights in the device's memory.
        bits: per weight of the compressed layers, scales included.
        quantizes_activations: whether layers compute in the format, and not in 16 bits with
            weights that are decoded.
        needs_data: whether the run needs calibration data.
        run_memory: bytes that the run needs at least.
        run_seconds: as `plan` estimates it for this machine's cores.
        max_tokens: of context that fit beside the weights, at most; None where that is not known.
    """

    variant: Variant
    level: str
    reason: str
    num_bytes: int
    bits: float
    quantizes_activations: bool
    needs_data: bool
    run_memory: int
    run_seconds: float
    max_tokens: int | None = None


@frozen
class Rejected:
    """A scheme that is out.

    Attributes:
        cause: that it cannot be planned, that the device or an engine refuses it, that it makes
            nothing smaller, or that it does not fit.
        reason: in one line.
    """

    scheme: str
    cause: Literal["plan", "device", "engine", "size", "memory"]
    reason: str


@frozen
class Recommendation:
    """What to take for a model on a device.

    Attributes:
        device: that will serve it.
        memory: bytes of the device; None where nobody said: then everything fits.
        source_bytes: of the model's weight files.
        num_threads: for which times are estimated.
        alternatives: what fits and runs, best first; one variant of each scheme.
        rejected: the other schemes.
        max_context: tokens of the longest sequence that the model takes, as far as its config says.
    """

    device: Hardware
    memory: int | None
    source_bytes: int
    num_threads: int
    alternatives: tuple[Alternative, ...]
    rejected: tuple[Rejected, ...]
    max_context: int | None = None

    @property
    def best(self) -> Alternative | None:
        """The one to take; None where nothing fits."""
        return self.alternatives[0] if self.alternatives else None


def recommend(
    source: Checkpoint,
    registry: Registry,
    device: Hardware | None,
    memory: int | None,
    effort: str = NORMAL_EFFORT,
) -> Recommendation:
    """What to take for a checkpoint.

    Args:
        device: that will serve it; None: that of this machine.
        memory: bytes of that device.
        effort: the level at which schemes are planned.

    Raises:
        BitpressError: the model cannot be compressed by any scheme, or none is installed.
    """
    device = device or detect_device()
    variants = list(find_variants(registry, effort))
    if not variants:
        raise RecipeError(NO_SCHEMES)
    num_threads = count_cores()
    alternatives: list[Alternative] = []
    rejected: list[Rejected] = []
    for variant in variants:
        try:
            plan = make_plan(source, Recipe((Rule("*", variant.steps),)), device)
            rejection = _find_rejection(variant.scheme, plan, memory)
        except BitpressError as e:
            rejection = Rejected(variant.scheme, "plan", str(e))
        if rejection is None:
            alternatives.append(_describe(variant, plan, memory, num_threads))
        else:
            rejected.append(rejection)
    _require_one_plan(rejected, len(variants))

    chosen = _choose_variants(alternatives)
    rejected += _find_needless_steps(chosen)
    needless = {out.scheme for out in rejected if out.cause == "size"}
    ranked = _rank(
        [alternative for scheme, alternative in chosen.items() if scheme not in needless]
    )
    names = {alternative.variant.scheme for alternative in ranked}
    # of a scheme's variants that are all out, the defaults come first
    first = {out.scheme: out for out in reversed(rejected) if out.scheme not in names}
    return Recommendation(
        device,
        memory,
        sum(header.nbytes for header in source.headers.values()),
        num_threads,
        tuple(ranked),
        tuple(first[scheme] for scheme in sorted(first)),
        source.model_config.max_position_embeddings,
    )


def _require_one_plan(rejected: Sequence[Rejected], num_variants: int) -> None:
    """Raise CheckpointError where nothing can be planned, all for one reason: the model is it."""
    reasons = {out.reason for out in rejected if out.cause == "plan"}
    if len(reasons) == 1 and sum(out.cause == "plan" for out in rejected) == num_variants:
        raise CheckpointError(reasons.pop())


def _choose_variants(alternatives: Sequence[Alternative]) -> dict[str, Alternative]:
    """One of each scheme: that with the best level, and among equals the first, since a scheme
    lists them in the order in which it would take them.
    """
    chosen: dict[str, Alternative] = {}
    for alternative in alternatives:
        first = chosen.setdefault(alternative.variant.scheme, alternative)
        if LEVELS.index(alternative.level) < LEVELS.index(first.level):
            chosen[alternative.variant.scheme] = alternative
    return chosen


def _find_needless_steps(chosen: Mapping[str, Alternative]) -> Iterator[Rejected]:
    """Compositions that are no smaller than one of their steps alone."""
    for scheme, alternative in chosen.items():
        steps = alternative.variant.steps
        for step in steps if len(steps) > 1 else ():
            alone = chosen.get(step.scheme.name)
            if alone is not None and alone.num_bytes <= alternative.num_bytes:
                yield Rejected(scheme, "size", f"it is no smaller than {step.scheme.name} alone")


def find_variants(registry: Registry, effort: str = NORMAL_EFFORT) -> Iterator[Variant]:
    """Every scheme with the options of a level of effort, and what its losses were measured of."""
    for scheme in registry.schemes.values():
        if scheme.quantizes_cache:
            # it makes no weight smaller
            continue
        level = scheme.efforts.get(effort, {})
        default = Variant((scheme.step(level),), {scheme.name: level}, scheme.losses_of(level))
        yield default
        all_options = [default.options]
        for loss in scheme.losses:
            names = [scheme.name, *([loss.then] if loss.then else [])]
            if any(name not in registry.schemes for name in names):
                continue
            if any(loss.options.get(name, value) != value for name, value in level.items()):
                # measured at another level
                continue
            options = {name: registry.schemes[name].efforts.get(effort, {}) for name in names}
            options[scheme.name] = {**level, **loss.options}
            if options in all_options:
                continue
            all_options.append(options)
            steps = tuple(registry.schemes[name].step(options[name]) for name in names)
            yield Variant(steps, options, _find_losses(scheme, options, loss.then))


def _find_losses(
    scheme: Scheme, options: Mapping[str, Mapping[str, Any]], then: str | None
) -> tuple[MeasuredLoss, ...]:
    """Those that were measured with these options, the scheme that follows with its defaults."""
    if then is not None and options[then]:
        return ()
    return scheme.losses_of(options[scheme.name], then)


def _find_rejection(scheme: str, plan: Plan, memory: int | None) -> Rejected | None:
    """Why a plan is none to recommend; None where it is one."""
    worst = _worst_finding(plan)
    if worst.level == "unsupported":
        return Rejected(scheme, "device", worst.text)
    if refusal := tensor_parallel.explain_refusal(plan):
        return Rejected(scheme, "engine", refusal)
    size, source_size = format_bytes(plan.output_bytes), format_bytes(plan.source_bytes)
    if plan.output_bytes >= plan.source_bytes:
        return Rejected(scheme, "size", f"it makes nothing smaller ({size} of {source_size})")
    if memory is not None and plan.output_bytes > MEMORY_SHARE * memory:
        share = format_bytes(int(MEMORY_SHARE * memory))
        fact = f"weights and cache have {share} of {format_bytes(memory)}"
        return Rejected(scheme, "memory", f"{size} of weights do not fit: {fact}")
    return None


def _describe(variant: Variant, plan: Plan, memory: int | None, num_threads: int) -> Alternative:
    worst = _worst_finding(plan)
    ranks = time_estimate.estimate_ranks(plan, 1)
    return Alternative(
        variant=variant,
        level=worst.level,
        reason=worst.text,
        num_bytes=plan.output_bytes,
        bits=_mean_bits(plan),
        quantizes_activations=any(
            fragment and fragment.get("input_activations") for fragment in plan.fragments.values()
        ),
        needs_data=plan.calibrated,
        run_memory=memory_estimate.estimate_memory(plan, num_threads),
        run_seconds=time_estimate.estimate_seconds(ranks, num_threads),
        max_tokens=_count_tokens(plan, memory),
    )


def _mean_bits(plan: Plan) -> float:
    """Stored bits per weight of the compressed layers."""
    num_bytes = num_weights = 0
    for stack in plan.stacks:
        num_bytes += sum(map(stack.stored_bytes, stack.members))
        num_weights += sum(entry.numel for entry in stack.members.values())
    return 8 * num_bytes / num_weights


def _worst_finding(plan: Plan) -> Finding:
    """What matters most of what the schemes say of the device: of each the best news, and of these
    the worst.
    """
    best: dict[str, Finding] = {}
    for name, finding in plan.findings:
        best.setdefault(name, finding)
    return max(
        best.values(), key=lambda finding: LEVELS.index(finding.level), default=NOTHING_KNOWN
    )


def _count_tokens(plan: Plan, memory: int | None) -> int | None:
    """Tokens of context whose keys and values fit beside the weights.

    A token takes a number for each row of the layers that make keys and values; less where the
    cache is quantized or a window slides. Models without such layers (latent attention) are not
    judged.
    """
    rows = sum(
        entry.shape[0]
        for entry in plan.source.entries.values()
        if entry.name.startswith(f"{plan.container}.")
        and entry.name.endswith((".k_proj.weight", ".v_proj.weight"))
    )
    if memory is None or not rows:
        return None
    return int(MEMORY_SHARE * memory - plan.output_bytes) // (CACHE_NUMBER_BYTES * rows)


def _rank(alternatives: Sequence[Alternative]) -> list[Alternative]:
    """The best first, as the module says."""
    # losses compare on one model: on that of which most are known
    counts = Counter(loss.model for other in alternatives for loss in other.variant.losses)
    model = counts.most_common(1)[0][0] if counts else ""

    def key(alternative: Alternative) -> tuple[bool, bool, int, bool, float, int, str]:
        losses = [loss.kl for loss in alternative.variant.losses if loss.model == model]
        return (
            alternative.level == "degraded",
            not alternative.quantizes_activations,
            LEVELS.index(alternative.level),
            alternative.needs_data,
            round(math.log2(losses[0])) if losses and losses[0] > 0 else math.inf,
            round(alternative.bits),
            alternative.variant.scheme,
        )

    return sorted(alternatives, key=key)
