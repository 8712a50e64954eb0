"""One block: its factors folded, then its sites observed and compressed in forward order."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import Tensor

from bitpress.checkpoint.reader import DTYPES
from bitpress.compression.calibration.activation_streams import Streams
from bitpress.compression.calibration.block_result import BlockNotes
from bitpress.compression.calibration.fold import rescale
from bitpress.compression.calibration.layer_groups import Site, in_order
from bitpress.compression.calibration.resumable_forward import Doors
from bitpress.compression.calibration.statistics import few, nothing, observe, reduce_statistics
from bitpress.planning.calibration_config import MIN_EXPERT_TOKENS
from bitpress.planning.layout import Shard
from bitpress.runtime import memory
from bitpress.runtime.process_group import ProcessGroup
from bitpress.runtime.progress import ReportProgress
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import input_rounding
from bitpress.schemes.values import Layer

Write = Callable[[str, Tensor], None]


def compress_block(
    shard: Shard,
    prefix: str,
    streams: Streams,
    write: Write,
    head: int | None,
    told: ReportProgress,
) -> BlockNotes:
    """Compress a block's stacks in the order in which its forward comes to them; the block computes
    with the result afterwards.

    Args:
        prefix: what the names of the block's tensors begin with.
        write: is given every stored tensor by name.
        head: channels of an attention head, where it is known.
    """
    notes = BlockNotes()
    sites = in_order(shard.stacks, prefix, streams)
    entrances = [site.entrance for site in sites if site.entrance is not None]
    rescale(sites, prefix, streams, head, notes)
    writers = [site.entrance for site in sites if site.entrance is not None and site.writes]
    doors = [
        Doors(block, entrances, writers)
        for block in (streams.block, streams.source)
        if block is not None
    ]
    for site in sites:
        # after doors: a layer's inputs are observed as they come
        site.round_inputs()
    process_group, device = streams.process_group, streams.device
    for number, site in enumerate(sites):
        owner = number % process_group.world_size
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            arrivals = streams.arrivals(number, site.writes) if site.entrance else ()
            stats, sample, seen = observe(site, arrivals)
            stats, sample, tokens = (
                reduce_statistics(process_group, stats, owner, device),
                process_group.broadcast_from_last(sample, device),
                sum(process_group.all_gather_object(seen)),
            )
            if site.routed and tokens < MIN_EXPERT_TOKENS:
                stats = nothing(site)
            layer = Layer(site.stack.name, site.weight, site.stack.dtype)
            # what observing took: what comes now is larger, and would not fit into its holes
            memory.release_freed_memory(streams.allowed)
            quantized = (
                pipeline.quantize_whole(layer, site.stack.steps, stats)
                if owner == process_group.rank
                else None
            )
        texts = process_group.all_gather_object(
            [str(w.message) for w in caught if w.category is UserWarning]
        )
        told_of = dict.fromkeys(text for theirs in texts for text in theirs)
        notes.warnings.extend(f"{site.stack.name}: {text}" for text in told_of)
        _note(site, tokens, notes)
        error = _store(site, quantized, sample, write, notes, process_group, owner)
        told(site.stack.source_bytes, f"{site.stack.name}: error {error:.4f}")
        del stats, layer, quantized, sample
        memory.release_freed_memory(streams.allowed)
    for door in doors:
        door.close()
    notes.warnings.extend(few(notes.tokens))
    return notes


def _note(site: Site, tokens: int, notes: BlockNotes) -> None:
    if site.routed and site.stack.calibrated:
        notes.tokens.update(dict.fromkeys(site.modules, tokens))
    elif site.stack.calibrated and not tokens:
        notes.warnings.append(
            f"{site.stack.name}: no token of the calibration data reached it; it was rounded "
            "without data"
        )
    for name, weight in site.weights.items():
        if not weight.any():
            notes.warnings.append(f"{name}: all its weights are zero")


def _store(
    site: Site,
    quantized: Layer | None,
    sample: Tensor | None,
    write: Write,
    notes: BlockNotes,
    process_group: ProcessGroup,
    owner: int,
) -> float:
    """Write what is stored of every member, let the block compute as it will be served, and return
    the largest output error.

    What is stored is what the stack's owner sends to the other ranks, who have no layer.
    """
    steps = site.stack.steps
    heights = [entry.shape[0] for entry in site.stack.members.values()]
    members = [None for _ in heights] if quantized is None else pipeline.split(quantized, heights)
    for (name, weight), member in zip(site.weights.items(), members, strict=True):
        planned, config = site.stack.describe_stored(name)
        if member is None:
            tensors = {
                n.removeprefix(f"{name}."): weight.new_empty(spec.shape, dtype=DTYPES[spec.dtype])
                for n, spec in planned.items()
            }
        else:
            record = pipeline.serialize(pipeline.pack(member, steps), steps)
            site.stack.check_stored(name, record)
            tensors = {
                n: record.tensors[n].to(weight.device)
                for n in (n.removeprefix(f"{name}.") for n in planned)
            }
        tensors = {
            suffix: process_group.broadcast(tensor, owner) for suffix, tensor in tensors.items()
        }
        for suffix, tensor in tensors.items():
            write(f"{name}.{suffix}", tensor)
        restored = pipeline.dequantize(tensors, config, steps, tuple(weight.shape))
        if (rounding := input_rounding(tensors, config, steps)) is not None:
            site.roundings[name] = rounding
        if sample is not None:
            wanted = sample.float() @ weight.float().T
            size = float(wanted.norm())
            notes.errors[name] = (
                float((sample.float() @ restored.T - wanted).norm()) / size if size else 0.0
            )
        weight.copy_(restored)
    return max((notes.errors.get(name, 0.0) for name in site.modules), default=0.0)
