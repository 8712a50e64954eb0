"""One block: its factors folded, then its sites observed and compressed in forward order."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from bitpress import chain, stacks
from bitpress.calibrate import folding, memory
from bitpress.calibrate.sites import Site, in_order
from bitpress.calibrate.streams import Arrival, Streams
from bitpress.calibrate.tokens import FEW, few
from bitpress.calibrate.walk import Doors
from bitpress.checkpoint.reader import DTYPES
from bitpress.errors import CheckpointError
from bitpress.layer import Layer, Stat
from bitpress.progress import Told
from bitpress.ranks import Ranks
from bitpress.rounding import input_rounding
from bitpress.shards import Shard

SAMPLE = 256  # tokens on which a layer's output error is measured
UNUSABLE = 1e-3  # of a batch's tokens that may be NaN or infinite
UNCHANGED = 1e-2  # of a block's output that a fold may seem to move it by, through roundings alone

Write = Callable[[str, Tensor], None]


@frozen
class BlockNotes:
    """What is to be told of a block.

    Attributes:
        errors: by layer, ||x (W - Q)ᵀ|| / ||x Wᵀ|| on a sample of its inputs.
        rescaled: by tensor, the exponents of two by which its "columns" and "rows" were multiplied.
        warnings: one line each, naming the layer.
        blocks: by block, ||h - h'|| / ||h'|| of the hidden states after it, h' being the source's.
        tokens: by layer of an expert, how many tokens were sent to it.
    """

    errors: dict[str, float] = field(factory=dict)
    rescaled: dict[str, dict[str, list[int]]] = field(factory=dict)
    warnings: list[str] = field(factory=list)
    blocks: dict[str, float] = field(factory=dict)
    tokens: dict[str, int] = field(factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return attrs.asdict(self)


def compress_block(shard: Shard, prefix: str, streams: Streams, write: Write, head: int | None, told: Told) -> BlockNotes:
    """Compress a block's stacks in the order in which its forward comes to them; the block computes with the result afterwards.

    Args:
        prefix: what the names of the block's tensors begin with.
        write: is given every stored tensor by name.
        head: channels of an attention head, where it is known.
    """
    notes = BlockNotes()
    sites = in_order(shard, prefix, streams)
    entrances = [site.entrance for site in sites if site.entrance is not None]
    _rescale(sites, prefix, streams, head, notes)
    writers = [site.entrance for site in sites if site.entrance is not None and site.writes]
    doors = [Doors(block, entrances, writers) for block in (streams.block, streams.source) if block is not None]
    for site in sites:
        site.round_inputs()  # after doors: a layer's inputs are observed as they come
    ranks, device = streams.ranks, streams.device
    for number, site in enumerate(sites):
        owner = number % ranks.count
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            arrivals = streams.arrivals(number, site.writes) if site.entrance else ()
            stats, sample, seen = _observe(site, arrivals)
            stats, sample, tokens = ranks.add_up(stats, owner, device), ranks.any(sample, device), sum(ranks.gather(seen))
            if site.routed and tokens < FEW:
                stats = _nothing(site)
            layer = Layer(site.stack.name, site.weight, site.stack.dtype)
            quantised = chain.quantize_whole(layer, site.stack.steps, stats) if owner == ranks.rank else None
        texts = ranks.gather([str(w.message) for w in caught if w.category is UserWarning])
        told_of = dict.fromkeys(text for theirs in texts for text in theirs)
        notes.warnings.extend(f"{site.stack.name}: {text}" for text in told_of)
        _note(site, tokens, notes)
        error = _store(site, quantised, sample, write, notes, ranks, owner)
        told(site.stack.reads, f"{site.stack.name}: error {error:.4f}")
        del stats, layer, quantised, sample
        memory.give_back(streams.allowed)
    for door in doors:
        door.close()
    notes.warnings.extend(few(notes.tokens))
    return notes


def _nothing(site: Site) -> list[dict[str, Stat]]:
    return [{} for _ in site.stack.steps]


def _observe(site: Site, arrivals: Iterable[Arrival]) -> tuple[list[dict[str, Stat]], Tensor | None, int]:
    """Every step's statistics over all batches, a sample of the inputs (tokens, in), and the number of tokens."""
    stats, sample, tokens = _nothing(site), None, 0
    if not site.stack.calibrated:
        return stats, sample, tokens
    weight = site.weight
    if site.routed:  # in the source's block the router sends it other tokens
        arrivals = (Arrival(arrival.inputs) for arrival in arrivals if len(arrival.inputs))
    for arrival in map(functools.partial(_usable, site.stack.name), _joined(arrivals)):
        for step, merged in zip(site.stack.steps, stats, strict=True):
            chain.merge(merged, chain.observe(step, weight, arrival.inputs, arrival.reference, arrival.residual))
        sample, tokens = arrival.inputs[:SAMPLE], tokens + len(arrival.inputs)
    return stats, sample, tokens


def _joined(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """`OBSERVED` tokens and more at a time: statistics are large, and adding them up costs."""
    for _, alike in itertools.groupby(arrivals, lambda arrival: arrival.reference is None):
        waiting: list[Arrival] = []
        for arrival in alike:
            waiting.append(arrival)
            if sum(len(a.inputs) for a in waiting) >= memory.OBSERVED:
                yield Arrival.joined(waiting)
                waiting = []
        if waiting:
            yield Arrival.joined(waiting)


def _usable(name: str, arrival: Arrival) -> Arrival:
    """Tokens whose numbers are finite; raises CheckpointError where too many are not."""
    tensors = [tensor for tensor in (arrival.inputs, arrival.reference, arrival.residual) if tensor is not None]
    if all(math.isfinite(tensor.sum()) for tensor in tensors):
        return arrival
    good = torch.stack([tensor.isfinite().all(1) for tensor in tensors]).all(0)
    bad = len(good) - int(good.sum())
    if bad > UNUSABLE * len(good):
        raise CheckpointError(
            f"layer {name}: {bad} of {len(good)} calibration tokens reach it as NaN or infinity: the model itself makes them "
            "(or its weights are damaged); check that it runs in this precision"
        )
    return arrival.only(good)


def _note(site: Site, tokens: int, notes: BlockNotes) -> None:
    if site.routed and site.stack.calibrated:
        notes.tokens.update(dict.fromkeys(site.modules, tokens))
    elif site.stack.calibrated and not tokens:
        notes.warnings.append(f"{site.stack.name}: no token of the calibration data reached it; it was rounded without data")
    for name, weight in site.weights.items():
        if not weight.any():
            notes.warnings.append(f"{name}: all its weights are zero")


def _store(
    site: Site, quantised: Layer | None, sample: Tensor | None, write: Write, notes: BlockNotes, ranks: Ranks, owner: int
) -> float:
    """Write what is stored of every member, let the block compute as it will be served, and return the largest output error.

    What is stored is what the stack's owner sends to the other ranks, who have no layer.
    """
    steps = site.stack.steps
    heights = [entry.shape[0] for entry in site.stack.members.values()]
    members = [None for _ in heights] if quantised is None else chain.split(quantised, heights)
    for (name, weight), member in zip(site.weights.items(), members, strict=True):
        planned, config = site.stack.stored(name)
        if member is None:
            tensors = {n.removeprefix(f"{name}."): weight.new_empty(s, dtype=DTYPES[t]) for n, (t, s) in planned.items()}
        else:
            record = chain.record(chain.pack(member, steps), steps)
            site.stack.check(name, record)
            tensors = {n: record.tensors[n].to(weight.device) for n in (n.removeprefix(f"{name}.") for n in planned)}
        tensors = {suffix: ranks.share(tensor, owner) for suffix, tensor in tensors.items()}
        for suffix, tensor in tensors.items():
            write(f"{name}.{suffix}", tensor)
        restored = chain.restore(tensors, config, steps, tuple(weight.shape))
        if (rounding := input_rounding(tensors, config, steps)) is not None:
            site.roundings[name] = rounding
        if sample is not None:
            wanted = sample.float() @ weight.float().T
            size = float(wanted.norm())
            notes.errors[name] = float((sample.float() @ restored.T - wanted).norm()) / size if size else 0.0
        weight.copy_(restored)
    return max((notes.errors.get(name, 0.0) for name in site.modules), default=0.0)


def _rescale(sites: Sequence[Site], prefix: str, streams: Streams, head: int | None, notes: BlockNotes) -> None:
    """Fold the factors that schemes choose into the block, one pass of all batches through its float weights deciding them."""
    numbered = [site for site in sites if site.entrance and any(step.rescales for step in site.stack.steps)]
    if not numbered:
        return
    doors = Doors(streams.block, [str(site.entrance) for site in numbered])
    observed = [_nothing(site) for site in numbered]
    for batch in range(len(streams.calls)):
        walk = streams.walk(batch)
        for number, site in enumerate(numbered):
            inputs, _ = walk.input(number, keep=number + 1 < len(numbered))  # and then it is over
            found, _, _ = _observe(site, [] if inputs is None else [Arrival(inputs)])
            for merged, of_batch in zip(observed[number], found, strict=True):
                chain.merge(merged, of_batch)
    doors.close()
    shapes = {name: tuple(parameter.shape) for name, parameter in streams.block.named_parameters(remove_duplicate=False)}
    unknown = []
    for site, stats in zip(numbered, observed, strict=True):
        members = [name.removeprefix(prefix) for name in site.modules]
        made_by = folding.producer(members, shapes, head)
        stats = streams.ranks.add_up(stats, 0, streams.device)
        layer = Layer(site.stack.name, site.weight, site.stack.dtype)
        factors = chain.rescale(layer, site.stack.steps, stats) if made_by and streams.ranks.first else None
        factors = streams.ranks.same(factors)
        if made_by is None:
            unknown.append(site.stack.name)
        elif factors is not None and not _fold(members, made_by, factors, streams, prefix, notes):
            notes.warnings.append(f"{site.stack.name}: {made_by.module} feeds more than this; its inputs are not rescaled")
    for _, alike in itertools.groupby(unknown, lambda name: stacks.PLACE.sub("*", name)):  # experts follow one another
        first, *more = alike
        others = f" and {len(more)} like it" if more else ""
        notes.warnings.append(f"{first}{others}: nothing is known that could take a rescaling of its inputs; not rescaled")


def _fold(
    members: Sequence[str], made_by: folding.Producer, factors: Tensor, streams: Streams, prefix: str, notes: BlockNotes
) -> bool:
    """Fold into the block and its source alike; undone, to the bit, where the block's output moves."""
    factors = folding.powers_of_two(factors, made_by.heads)
    call, hidden = streams.sample()
    before = call(streams.block, hidden)
    changes = folding.fold(streams.block, members, made_by, factors)
    moved = (call(streams.block, hidden) - before).norm()
    if not streams.ranks.same(bool(moved <= UNCHANGED * before.norm())):
        folding.fold(streams.block, members, made_by, 1 / factors)
        return False
    if streams.source is not None:
        folding.fold(streams.source, members, made_by, factors)
    for change in changes:
        notes.rescaled.setdefault(prefix + change.tensor, {})[change.axis] = change.exponents
    return True
