"""Factors for the columns of a layer, their inverse folded into what produces the layer's input.

Factors are powers of two, so that nothing is rounded: the function stays the same to the bit
wherever multiplication commutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from attrs import frozen
from torch import Tensor, nn

from bitpress.checkpoint import layer_names
from bitpress.compression.calibration.activation_streams import Arrival, Streams
from bitpress.compression.calibration.block_result import BlockNotes
from bitpress.compression.calibration.layer_groups import Site
from bitpress.compression.calibration.resumable_forward import Doors
from bitpress.compression.calibration.statistics import nothing, observe, reduce_statistics
from bitpress.schemes import pipeline
from bitpress.schemes.values import Layer


@frozen
class Producer:
    """What makes the input of a stack.

    Attributes:
        module: a norm, or a linear layer whose rows are the input's channels.
        heads: for values that several query heads share, how many consecutive channels make a head
            and how many heads share it.
    """

    module: str
    heads: tuple[int, int] | None = None


def producer(
    members: Sequence[str], shapes: Mapping[str, tuple[int, ...]], head: int | None
) -> Producer | None:
    """What makes the input of a stack, by the names that decoders give their layers; None where it
    is not known.

    Args:
        members: names of the stack's layers, relative to their block.
        shapes: of every tensor of the block, by the same names.
        head: channels of an attention head.
    """
    parent, _, leaf = members[0].rpartition(".")
    width = shapes[f"{members[0]}.weight"][1]
    siblings = f"{parent}." if parent else ""
    if leaf in ("q_proj", "qkv_proj", "query_key_value"):
        names = ["input_layernorm"]
    elif leaf in ("gate_proj", "gate_up_proj", "up_proj", "dense_h_to_4h", "w1", "w3"):
        if any(".experts." in name for name in shapes):
            # the norm feeds a router and every expert
            return None
        names = (
            ["pre_feedforward_layernorm"]
            if "pre_feedforward_layernorm.weight" in shapes
            else ["post_attention_layernorm"]
        )
    elif leaf in ("down_proj", "w2"):
        names = [f"{siblings}{'up_proj' if leaf == 'down_proj' else 'w3'}"]
    elif leaf == "o_proj" and head:
        rows = shapes.get(f"{siblings}v_proj.weight", (0,))[0]
        if not rows or width % rows or rows % head:
            return None
        return Producer(f"{siblings}v_proj", None if rows == width else (head, width // rows))
    else:
        return None
    return next((Producer(n) for n in names if shapes.get(f"{n}.weight", (0,))[0] == width), None)


def powers_of_two(factors: Tensor, heads: tuple[int, int] | None) -> Tensor:
    """The nearest powers of two (in,), one for all channels that come from the same row of the
    producer.
    """
    exponents = factors.float().clamp(2.0**-14, 2.0**14).log2()
    if heads is not None:
        size, sharing = heads
        exponents = exponents.view(-1, sharing, size)
        exponents = exponents.mean(1, keepdim=True).expand_as(exponents).reshape(-1)
    return exponents.round().exp2()


@frozen(eq=False)
class Change:
    """A tensor of the block whose columns or rows were multiplied by powers of two, given as
    exponents.
    """

    tensor: str
    axis: str
    exponents: list[int]


def fold(
    block: nn.Module, members: Sequence[str], made_by: Producer, factors: Tensor
) -> list[Change]:
    """Multiply the members' columns and divide what the producer makes, in place."""
    columns = [int(e) for e in factors.log2().tolist()]
    for name in members:
        block.get_parameter(f"{name}.weight").mul_(factors)
    changes = [Change(f"{name}.weight", "columns", columns) for name in members]
    rows = factors
    if made_by.heads is not None:
        size, sharing = made_by.heads
        rows = factors.view(-1, sharing, size)[:, 0].reshape(-1)
    for leaf, parameter in block.get_submodule(made_by.module).named_parameters(recurse=False):
        parameter.div_(rows if parameter.ndim == 1 else rows.unsqueeze(1))
        changes.append(
            Change(f"{made_by.module}.{leaf}", "rows", [-int(e) for e in rows.log2().tolist()])
        )
    return changes


# of a block's output that a fold may seem to move it by, through roundings alone
UNCHANGED = 1e-2


def rescale(
    sites: Sequence[Site], prefix: str, streams: Streams, head: int | None, notes: BlockNotes
) -> None:
    """Fold the factors that schemes choose into the block, one pass of all batches through its
    float weights deciding them.
    """
    numbered = [
        site for site in sites if site.entrance and any(step.rescales for step in site.stack.steps)
    ]
    if not numbered:
        return
    doors = Doors(streams.block, [str(site.entrance) for site in numbered])
    observed = [nothing(site) for site in numbered]
    for batch in range(len(streams.calls)):
        walk = streams.walk(batch)
        for number, site in enumerate(numbered):
            # and then it is over
            inputs, _ = walk.input(number, keep=number + 1 < len(numbered))
            found, _, _ = observe(site, [] if inputs is None else [Arrival(inputs)])
            for merged, of_batch in zip(observed[number], found, strict=True):
                pipeline.merge(merged, of_batch)
    doors.close()
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in streams.block.named_parameters(remove_duplicate=False)
    }
    unknown = []
    for site, stats in zip(numbered, observed, strict=True):
        members = [name.removeprefix(prefix) for name in site.modules]
        made_by = producer(members, shapes, head)
        stats = reduce_statistics(streams.process_group, stats, 0, streams.device)
        layer = Layer(site.stack.name, site.weight, site.stack.dtype)
        factors = (
            pipeline.rescale(layer, site.stack.steps, stats)
            if made_by and streams.process_group.is_rank_zero
            else None
        )
        factors = streams.process_group.broadcast_object(factors)
        if made_by is None:
            unknown.append(site.stack.name)
        elif factors is not None and not _fold(members, made_by, factors, streams, prefix, notes):
            notes.warnings.append(
                f"{site.stack.name}: {made_by.module} feeds more than this; its inputs are not "
                "rescaled"
            )
    # experts follow one another
    for _, alike in itertools.groupby(unknown, lambda name: layer_names.INDEX_PART.sub("*", name)):
        first, *more = alike
        others = f" and {len(more)} like it" if more else ""
        notes.warnings.append(
            f"{first}{others}: nothing is known that could take a rescaling of its inputs; not "
            "rescaled"
        )


def _fold(
    members: Sequence[str],
    made_by: Producer,
    factors: Tensor,
    streams: Streams,
    prefix: str,
    notes: BlockNotes,
) -> bool:
    """Fold into the block and its source alike; undone, to the bit, where the block's output
    moves.
    """
    factors = powers_of_two(factors, made_by.heads)
    call, hidden = streams.sample()
    before = call(streams.block, hidden)
    changes = fold(streams.block, members, made_by, factors)
    moved = (call(streams.block, hidden) - before).norm()
    if not streams.process_group.broadcast_object(bool(moved <= UNCHANGED * before.norm())):
        fold(streams.block, members, made_by, 1 / factors)
        return False
    if streams.source is not None:
        fold(streams.source, members, made_by, factors)
    for change in changes:
        notes.rescaled.setdefault(prefix + change.tensor, {})[change.axis] = change.exponents
    return True
