"""The places in a block where stacks are compressed, in forward order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from attrs import field, frozen
from torch import Tensor, nn

from bitpress.compression.calibration.activation_streams import Streams
from bitpress.modeling.experts import is_routed
from bitpress.planning.layout import Stack
from bitpress.schemes.activation_quantizer import Rounding


@frozen(eq=False)
class Site:
    """A stack inside a block that is being compressed.

    Attributes:
        modules: the stack's layers in the block, by their full names.
        entrance: the layer at which a forward comes to the stack, by its name within the block;
            None where none does.
        writes: whether its output is added to the residual stream.
        routed: whether it is given the tokens that a router sends to it, and no others.
        roundings: once the stack has been compressed, what the block makes of the inputs of each
            layer.
    """

    stack: Stack
    modules: Mapping[str, nn.Module]
    entrance: str | None
    writes: bool
    routed: bool = False
    roundings: dict[str, Rounding] = field(factory=dict)

    @property
    def weight(self) -> Tensor:
        """(out, in) float32: all rows, with the numbers that the block computes with now."""
        return torch.cat([weight.float() for weight in self.weights.values()])

    @property
    def weights(self) -> dict[str, Tensor]:
        """Each layer's own."""
        return {name: module.get_parameter("weight") for name, module in self.modules.items()}

    def round_inputs(self) -> None:
        """Let the layers compute with rounded inputs, once it is known how; forwards may be waiting
        in them by then.
        """
        # and not the site, which holds the modules: a block whose hooks held it would not be freed
        roundings = self.roundings
        for name, module in self.modules.items():

            def hook(
                module: nn.Module, arguments: tuple[Tensor, ...], name: str = name
            ) -> tuple[Tensor, ...]:
                if (rounding := roundings.get(name)) is None:
                    return arguments
                inputs, *others = arguments
                return (rounding(inputs.flatten(0, -2)).view_as(inputs).to(inputs.dtype), *others)

            module.register_forward_pre_hook(hook)


def in_order(stacks: Sequence[Stack], prefix: str, streams: Streams) -> list[Site]:
    """A block's stacks in the order in which a forward comes to them, those that it does not come
    to last.
    """
    names = [module.removeprefix(prefix) for stack in stacks for module in stack.members]
    course = streams.course(names)
    called = course.called
    # then they may write for some tokens only
    some = any(is_routed(streams.block, name) for name in course.writers)
    writers = () if some else course.writers
    found = []
    for stack in stacks:
        entrance = next((name for name in called if prefix + name in stack.members), None)
        modules = {
            module: streams.block.get_submodule(module.removeprefix(prefix))
            for module in stack.members
        }
        writes = entrance in writers and len(modules) == 1
        found.append(
            Site(
                stack,
                modules,
                entrance,
                writes,
                entrance is not None and is_routed(streams.block, entrance),
            )
        )
    return sorted(
        found, key=lambda site: called.index(site.entrance) if site.entrance else len(called)
    )
