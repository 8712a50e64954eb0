"""Factors for the columns of a layer, their inverse folded into what produces the layer's input.

Factors are powers of two, so that nothing is rounded: the function stays the same to the bit
wherever multiplication commutes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen
from torch import Tensor, nn


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
