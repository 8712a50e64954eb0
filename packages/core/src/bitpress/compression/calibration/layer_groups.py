"""The layer groups of a block that is being compressed, in the order of its forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from attrs import field, frozen
from torch import Tensor, nn

from bitpress.checkpoint.reader import DTYPES, Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.compression.calibration.activation_streams import ActivationStreams
from bitpress.modeling.experts import find_expert_layer, is_routed
from bitpress.modeling.host_weights import computed_weight
from bitpress.planning.attention_caches import AttentionCache
from bitpress.planning.layout import Shard, Stack
from bitpress.planning.plan import Plan
from bitpress.schemes.activation_quantizer import ActivationQuantizer, quantize_arguments
from bitpress.schemes.values import Layer, Statistic

# By stack, what each of its steps has observed of the gradients of its output.
GradientsByStack = Mapping[str, Sequence[Mapping[str, Statistic]]]


@frozen(eq=False)
class BlockPlan:
    """What a plan says of a decoder block.

    Attributes:
        prefix: what the names of its tensors begin with.
        stacks: what is compressed of it.
        head_dim: channels of an attention head; None where the config does not say.
        entries: the source's tensors, by name.
        gradient_statistics: by stack, what each of its steps has observed of the gradients of its
            output.
        caches: of its attentions, for which something is stored.
        reader: of the source's files; None where nothing is solved.
    """

    prefix: str
    stacks: Sequence[Stack]
    head_dim: int | None
    entries: Mapping[str, Entry]
    gradient_statistics: GradientsByStack = field(factory=dict)
    caches: Sequence[AttentionCache] = ()
    reader: Reader | None = None

    @classmethod
    def of_shard(
        cls, plan: Plan, shard: Shard, reader: Reader, gradient_statistics: GradientsByStack
    ) -> BlockPlan:
        """What a plan says of the block that a shard holds."""
        prefix, entries = f"{plan.container}.{shard.block}.", plan.source.entries
        return cls(
            prefix,
            shard.stacks,
            plan.head_dim,
            entries,
            gradient_statistics,
            shard.caches,
            reader,
        )

    def source_dtype(self, tensor: str) -> torch.dtype:
        """The dtype that a tensor of the block, by its name there, has in the source."""
        return DTYPES[self.entries[self.prefix + tensor].dtype]


@frozen(eq=False)
class LayerGroup:
    """A stack in a block that is being compressed: layers that read one input.

    Attributes:
        modules: its layers, by their full names.
        first_layer: the one that a forward pass calls first, by its name within the block; None
            where it calls none.
        is_residual: whether the group's output is added to the residual stream.
        is_routed: whether it is given the tokens that a router sends to it, and no others.
        gradient_statistics: what each step has observed of the gradients of the group's output;
            empty where nothing was.
        reader: of the source's files; None where nothing is solved.
        input_quantizers: by layer, what is made of its inputs: filled when the group is installed.
    """

    stack: Stack
    modules: Mapping[str, nn.Module]
    first_layer: str | None = None
    is_residual: bool = False
    is_routed: bool = False
    gradient_statistics: Sequence[Mapping[str, Statistic]] = ()
    reader: Reader | None = None
    input_quantizers: dict[str, ActivationQuantizer] = field(factory=dict)

    @classmethod
    def in_block(cls, stack: Stack, block: nn.Module, prefix: str) -> LayerGroup:
        """A stack's layers in a block; nothing is known of the forward pass."""
        modules = {name: block.get_submodule(name.removeprefix(prefix)) for name in stack.members}
        return cls(stack, modules)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Each layer's weight (out, in) as the block computes with it now, not to be changed."""
        return {name: computed_weight(module) for name, module in self.modules.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Each layer's weight (out, in) where it can be changed, on whichever device."""
        return {name: module.get_parameter("weight") for name, module in self.modules.items()}

    @property
    def weights_device(self) -> torch.device:
        """In whose memory the weights lie, and what is as large as all of a block's."""
        return next(iter(self.parameters.values())).device

    @property
    def weight(self) -> Tensor:
        """(out, in) float32: the rows of all layers, in order."""
        return torch.cat([weight.float() for weight in self.weights.values()])

    @property
    def layer(self) -> Layer:
        """What schemes are given: all layers as one."""
        return Layer(self.stack.name, self.weight, self.stack.dtype)

    def register_input_quantizers(self) -> None:
        """Let each layer quantize its inputs as soon as it is known how.

        Forward passes may have stopped at the group by then: hooks that are registered later would
        not be called by these.
        """
        # not the group, which holds the modules: a block whose hooks held it would not be freed
        input_quantizers = self.input_quantizers
        for name, module in self.modules.items():

            def quantize_inputs(
                module: nn.Module, arguments: tuple[Tensor, ...], name: str = name
            ) -> tuple[Tensor, ...]:
                quantizer = input_quantizers.get(name)
                return arguments if quantizer is None else quantize_arguments(quantizer, arguments)

            module.register_forward_pre_hook(quantize_inputs)


def order_layer_groups(block_plan: BlockPlan, streams: ActivationStreams) -> list[LayerGroup]:
    """A block's stacks in the order in which its forward pass comes to them, those last to which it
    does not come.
    """
    block, prefix = streams.block, block_plan.prefix
    if not block_plan.stacks:
        return []
    layers = [
        module.removeprefix(prefix) for stack in block_plan.stacks for module in stack.members
    ]
    trace = streams.trace_forward(layers)
    called_layers, residual_layers = trace.called_layers, trace.residual_layers
    # experts add to the residual stream of some tokens only
    if any(is_routed(block, name) for name in residual_layers):
        residual_layers = ()

    groups = []
    for stack in block_plan.stacks:
        modules = LayerGroup.in_block(stack, block, prefix).modules
        first_layer = next((name for name in called_layers if prefix + name in modules), None)
        is_residual = first_layer in residual_layers and len(modules) == 1
        has_router = first_layer is not None and is_routed(block, first_layer)
        gradient_statistics = block_plan.gradient_statistics.get(stack.name, ())
        groups.append(
            LayerGroup(
                stack,
                modules,
                first_layer,
                is_residual,
                has_router,
                gradient_statistics,
                block_plan.reader,
            )
        )

    def position(group: LayerGroup) -> int:
        if group.first_layer is None:
            return len(called_layers)
        return called_layers.index(group.first_layer)

    return sorted(groups, key=position)


def side_by_side(groups: Sequence[LayerGroup], block: nn.Module) -> Iterator[list[LayerGroup]]:
    """Layer groups of a block, in their order, together those that wait for none of each other: the
    same layers of experts that compute side by side.
    """

    def neighbors(group: LayerGroup) -> object:
        expert_layer = group.first_layer and find_expert_layer(block, group.first_layer)
        return expert_layer.neighbors if expert_layer else group.stack.name

    for _, together in itertools.groupby(groups, neighbors):
        yield list(together)
