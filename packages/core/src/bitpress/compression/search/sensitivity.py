"""What each choice costs: the KL divergence that one unit, compressed alone, causes in a model that
is otherwise the source.

The model is gone through once, one block in memory at a time. Most sequences serve to fit
candidates, as in a calibrated run; the others, which no candidate has seen, to judge them. In each
block every candidate compresses every unit in turn; the hidden states that the block then makes of
the judged sequences go on through the source's other blocks beside the source's own, and after the
last one their predictions are compared. That is exact, and takes as many forwards of a block as
there are units, candidates and blocks after them, for the judged tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen
from torch import Tensor

from bitpress.checkpoint.reader import Reader
from bitpress.compression.calibration.activation_streams import Streams
from bitpress.compression.calibration.block_result import BlockNotes
from bitpress.compression.calibration.fold import rescale
from bitpress.compression.calibration.layer_groups import Site, in_order
from bitpress.compression.calibration.resumable_forward import Doors
from bitpress.compression.calibration.statistics import nothing, observe
from bitpress.compression.search.candidates import Unit
from bitpress.errors import CheckpointError
from bitpress.modeling.block_runner import _Way
from bitpress.modeling.capture import head, record
from bitpress.modeling.decoder import Decoder
from bitpress.modeling.metrics import LOGITS, divergence
from bitpress.modeling.tokens import Sequences
from bitpress.planning import memory_estimate
from bitpress.planning.calibration_config import MIN_EXPERT_TOKENS
from bitpress.planning.plan import Plan
from bitpress.runtime import memory
from bitpress.runtime.progress import Told
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import input_rounding
from bitpress.schemes.values import Layer

# tokens on which candidates are judged
JUDGED = 4096

# choices whose predictions are compared with the source's while these are at hand
TOGETHER = 8

# by unit and candidate, nats per token
Damages = Mapping[tuple[str, str], float]


@frozen
class Room:
    """What the measurement may hold.

    Attributes:
        place: a folder in which hidden states are kept; None keeps them in memory.
        waiting: how many forwards may wait inside a block.
    """

    place: Path | None
    waiting: int


def parts(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences that candidates are fitted to, and those that they are judged on, which are
    spread over all.

    One alone serves for both.
    """
    count = min(max(JUDGED // ids.shape[1], 1), len(ids) // 2)
    chosen = torch.zeros(len(ids), dtype=torch.bool)
    chosen[[i * len(ids) // count for i in range(count)]] = True
    return (ids[~chosen], ids[chosen]) if count else (ids, ids)


def measure(
    plan: Plan,
    units: Sequence[Unit],
    data: Sequences,
    device: torch.device,
    room: Room,
    trust: bool,
    told: Told,
) -> Damages:
    """Every candidate's damage to every unit.

    Args:
        plan: of any candidate: where the model lies, and how it is built.
        told: is told the bytes of every unit's source, once for each candidate.

    Raises:
        CheckpointError: transformers cannot build the model, or it makes numbers that are not
            finite.
    """
    names = [name for name, stacks in units[0].made.items() if stacks[0].steps]
    fitted, judged = _split_batches(data.ids)
    if not any(stack.calibrated for name in names for stack in units[0].made[name]):
        # nothing is fitted to them: one shows how a forward goes
        fitted = fitted[:1]
    with Reader() as reader, torch.no_grad(), memory.freed_kept():
        decoder = Decoder(
            plan.source, plan.container, reader, device, torch.float32, trust, data.all_experts
        )
        recording = record(decoder, [*fitted, *judged], device, torch.float32, room.place)
        states = recording.hidden
        plain = _Way(states, range(len(fitted), len(states)))
        trials: dict[tuple[str, str], _Way] = {}
        streams = Streams(states, None, (), room.waiting, device)
        for index in range(len(decoder)):
            own = [unit for unit in units if unit.block == index]
            prefix = f"{plan.container}.{index}."
            calls, recording.calls[index] = recording.calls[index], []
            fitting, judging = calls[: len(fitted)], calls[len(fitted) :]
            block = decoder.block(index)
            for way in trials.values():
                way.go(block, judging, device)
            for name in names if own else ():
                streams.enter(decoder.block(index), None, fitting)
                for unit in _compressed(own, name, prefix, streams, plan.head_dim):
                    trials[unit.name, name] = plain.branch(streams.block, judging, device)
                    num_bytes = sum(stack.source_bytes for stack in unit.made[name])
                    told(num_bytes, f"{unit.name}: {name}")
            if index + 1 < len(decoder):
                streams.enter(block, None, fitting)
                streams.leave()
            plain.go(block, judging, device)
            memory.give_back()
        with head(decoder, plain.beside) as logits:
            found = _divergences(logits, plain, list(trials.values()), device)
    if not all(map(math.isfinite, found)):
        raise CheckpointError(
            f"{plan.source.folder}: the model makes NaN or infinity of the calibration text; check "
            "its weights"
        )
    return _damages(units, dict(zip(trials, found, strict=True)))


def _split_batches(ids: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The batches that candidates are fitted to, and those that they are judged on."""
    fitted, judged = parts(ids)
    sequences = max(memory_estimate.BATCH_TOKENS // ids.shape[1], 1)
    return torch.split(fitted, sequences), torch.split(judged, sequences)


def _damages(units: Sequence[Unit], divergences: Damages) -> Damages:
    """What every candidate costs every unit; one that leaves it as it is costs nothing."""
    return {
        # a divergence is below 0 only by rounding
        (unit.name, name): max(divergences.get((unit.name, name), 0.0), 0.0)
        for unit in units
        for name in unit.made
    }


def _compressed(
    units: Sequence[Unit], candidate: str, prefix: str, streams: Streams, heads: int | None
) -> Iterator[Unit]:
    """One unit after another, while the block computes with it compressed and with all else as the
    source has it.

    Args:
        prefix: what the names of the block's tensors begin with.
        heads: channels of an attention head, where it is known.
    """
    belongs = {stack.name: unit for unit in units for stack in unit.made[candidate]}
    left = {unit.name: len(unit.made[candidate]) for unit in units}
    sites = in_order([stack for unit in units for stack in unit.made[candidate]], prefix, streams)
    rescale(sites, prefix, streams, heads, BlockNotes())
    doors = Doors(streams.block, [site.entrance for site in sites if site.entrance is not None])
    for site in sites:
        site.round_inputs()
    waiting: dict[str, list[Callable[[], None]]] = {}
    for number, site in enumerate(sites):
        unit = belongs[site.stack.name]
        waiting.setdefault(unit.name, []).append(_solved(site, number, streams))
        left[unit.name] -= 1
        if not left[unit.name]:
            before = [
                (weight, weight.clone())
                for s in sites
                if belongs[s.stack.name] is unit
                for weight in s.weights.values()
            ]
            for replace in waiting.pop(unit.name):
                replace()
            yield unit
            for weight, kept in before:
                weight.copy_(kept)
            for other in sites:
                other.roundings.clear()
    doors.close()


def _solved(site: Site, number: int, streams: Streams) -> Callable[[], None]:
    """Compress a site; what is returned lets the block compute with the result."""
    steps = site.stack.steps
    with warnings.catch_warnings():
        # `compress` tells of them
        warnings.simplefilter("ignore", UserWarning)
        stats, _, tokens = observe(site, streams.arrivals(number, False) if site.entrance else ())
        stats = nothing(site) if site.routed and tokens < MIN_EXPERT_TOKENS else stats
        layer = pipeline.quantize_whole(
            Layer(site.stack.name, site.weight, site.stack.dtype), steps, stats
        )
    heights = [entry.shape[0] for entry in site.stack.members.values()]
    made = []
    for (name, weight), member in zip(
        site.weights.items(), pipeline.split(layer, heights), strict=True
    ):
        stored = pipeline.record(pipeline.pack(member, steps), steps)
        restored = pipeline.dequantize(stored.tensors, stored.config, steps, tuple(weight.shape))
        made.append((name, weight, restored, input_rounding(stored.tensors, stored.config, steps)))

    def replace() -> None:
        for name, weight, restored, rounding in made:
            weight.copy_(restored)
            if rounding is not None:
                site.roundings[name] = rounding

    return replace


def _divergences(
    logits: Callable[[Tensor], Tensor], plain: _Way, ways: Sequence[_Way], device: torch.device
) -> list[float]:
    """KL divergence of each way from the plain one, in nats per token."""
    sums, tokens = [0.0] * len(ways), 0
    for batch in range(len(plain)):
        source = plain[batch]
        tokens += len(source)
        for first in range(0, len(ways), TOGETHER):
            others = [way[batch] for way in ways[first : first + TOGETHER]]
            at, count = 0, 1
            while at < len(source):
                piece = slice(at, at + count)
                expected = (
                    logits(source[piece].to(device)).float().log_softmax(-1)
                )  # (tokens, vocabulary)
                for i, other in enumerate(others, first):
                    sums[i] += divergence(
                        expected, logits(other[piece].to(device)).float().log_softmax(-1)
                    )
                at, count = at + count, max(LOGITS // expected.shape[1], 1)
    return [total / tokens for total in sums]
