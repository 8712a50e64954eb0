"""What schemes observe of the gradients of the loss with respect to their layers' outputs: one
backward pass of the source model, block by block.

The tokens that follow are drawn from the model's own predictions, so that the mean of g gᵀ is its
Fisher information. On the way forward the hidden states before every block are kept; on the way
back each block is run again from these, with gradients.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from attrs import frozen
from torch import Tensor, nn
from torch.nn import functional

from bitpress.compression.calibration.layer_groups import LayerGroup
from bitpress.compression.calibration.statistics import StepStatistics, move_statistics
from bitpress.modeling.capture import BlockCall, ExtraOutputs, open_head
from bitpress.modeling.decoder import Decoder
from bitpress.modeling.hidden_states import HiddenStates
from bitpress.modeling.metrics import Head
from bitpress.planning.layout import Stack
from bitpress.planning.memory_estimate import MAX_LOGITS
from bitpress.runtime import memory
from bitpress.runtime.lanes import Lanes
from bitpress.schemes import pipeline
from bitpress.schemes.values import Statistic


@frozen(eq=False)
class SampleBatches:
    """The batches that gradients are taken of, as the source model makes them.

    Attributes:
        states: before the first block of the pass, one tensor for each batch.
        calls: of every block, and in it of each of the batches.
        numbers: of the batches among those of all ranks; what is drawn for one follows from it.
    """

    states: HiddenStates
    calls: Sequence[Sequence[BlockCall]]
    numbers: Sequence[int]


class GradientStatistics:
    """What the steps of every stack have observed of gradients.

    Args:
        values: where they are kept, empty.
    """

    def __init__(self, values: HiddenStates | None = None) -> None:
        self._values = HiddenStates() if values is None else values
        # by stack and step, of each statistic: where its value is, and the rest of it
        self._index: dict[str, list[dict[str, tuple[int, Statistic]]]] = {}

    def add(self, stack: str, by_step: Sequence[StepStatistics]) -> None:
        """Take those of one stack."""
        self._index[stack] = []
        for step_statistics in by_step:
            places = {}
            for name, statistic in step_statistics.items():
                self._values.append(statistic.value)
                meta = Statistic(statistic.value.to("meta"), statistic.merge, statistic.rows)
                places[name] = (len(self._values) - 1, meta)
            self._index[stack].append(places)

    def of_stack(self, stack: str) -> list[StepStatistics]:
        """Those of each step, where they are kept; empty where none were taken."""
        return [
            {
                name: Statistic(self._values[place], meta.merge, meta.rows)
                for name, (place, meta) in places.items()
            }
            for places in self._index.get(stack, ())
        ]


@frozen(eq=False)
class GradientSource:
    """The model that is run backward.

    Attributes:
        decoder: loads its blocks.
        stacks: by number of the block, what is compressed of it.
        container: the name of the list of blocks, as the stacks' layers have it.
        lanes: batches run side by side in these.
    """

    decoder: Decoder
    stacks: Mapping[int, Sequence[Stack]]
    container: str
    lanes: Lanes

    @property
    def device(self) -> torch.device:
        """The one that computes."""
        return self.decoder.options.device

    def gradient_groups(self, index: int, block: nn.Module) -> list[LayerGroup]:
        """The layer groups of a block of whose outputs' gradients a step takes statistics."""
        return [
            LayerGroup.in_block(stack, block, f"{self.container}.{index}.")
            for stack in self.stacks.get(index, ())
            if any(map(pipeline.takes_gradient, stack.steps))
        ]


def observe_gradients(
    source: GradientSource, sample: SampleBatches, first_block: int
) -> GradientStatistics:
    """The statistics of all stacks of all blocks from one on; of none without batches.

    They are kept where the sample's hidden states are.

    Args:
        sample: its states stand before the first block.
    """
    decoder, device = source.decoder, source.device
    positions = range(len(sample.numbers))
    statistics = GradientStatistics(sample.states.kept_alike())
    if not sample.numbers:
        return statistics
    states, extra_outputs = [sample.states], None
    for index in range(first_block, len(decoder)):
        outputs = sample.states.kept_alike()
        run = functools.partial(
            _run_forward, decoder.load_block(index), sample.calls[index], states[-1], device
        )
        for result in source.lanes.map(run, positions):
            output, extra_outputs = result
            outputs.append(output)
        states.append(outputs)
        # the next block does not fit into the holes that this one leaves
        del run
        memory.release_freed_memory()

    gradients = states.pop()
    with open_head(decoder, extra_outputs) as head:

        def start_backward(position: int) -> None:
            hidden_states = gradients.bring(position, device, position + 1)
            number = sample.numbers[position]
            gradients[position] = _loss_gradient(head, hidden_states, seed=number)

        for _ in source.lanes.map(start_backward, positions):
            pass

    for index in reversed(range(first_block, len(decoder))):
        inputs, block = states.pop(), decoder.load_block(index)
        observer = _GroupObserver(source.gradient_groups(index, block), device)
        backward = _Backward(block, sample.calls[index], inputs, gradients, observer)
        for by_group in source.lanes.map(backward.run, positions):
            observer.merge(by_group)
        observer.hand_over(statistics)
        del block, observer, backward, by_group
        memory.release_freed_memory()
    return statistics


def _loss_gradient(head: Head, hidden_states: Tensor, seed: int) -> Tensor:
    """The gradient of the cross entropy against drawn labels, (sequences, length, channels)."""
    tokens = hidden_states.flatten(0, -2)  # (tokens, channels)
    gradient = torch.empty_like(tokens)
    # drawn on the CPU: on every device the same
    uniform = torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed))
    # one token shows how large the vocabulary is
    start, num_tokens = 0, 1
    while start < len(tokens):
        chunk = slice(start, start + num_tokens)
        with torch.enable_grad():
            leaf = tokens[chunk].detach().requires_grad_()
            logits = head(leaf).float()  # (tokens, vocabulary)
            labels = _draw(logits.detach().softmax(-1), uniform[chunk].to(logits.device))
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            (gradient[chunk],) = torch.autograd.grad(loss, leaf)
        start, num_tokens = chunk.stop, max(MAX_LOGITS // logits.shape[1], 1)
    return gradient.view_as(hidden_states)


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """A token for each row of probabilities (tokens, vocabulary), from numbers (tokens,) drawn from
    0 to 1.
    """
    cumulative = probabilities.cumsum(1)
    target = (uniform * cumulative[:, -1]).unsqueeze(1)
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return drawn.clamp_(max=probabilities.shape[1] - 1)


# Of each of a block's layer groups, the statistics of every step.
StatisticsByGroup: TypeAlias = list[list[StepStatistics]]


class _GroupObserver:
    """Adds up what the steps of a block's layer groups observe of gradients, batch by batch.

    Args:
        device: that computes.
    """

    def __init__(self, groups: Sequence[LayerGroup], device: torch.device) -> None:
        self.device = device
        self.modules = {name: module for group in groups for name, module in group.modules.items()}
        self._groups = groups
        self._merged = self._empty()

    def _empty(self) -> StatisticsByGroup:
        return [[{} for _ in group.stack.steps] for group in self._groups]

    def observe(self, gradients: Mapping[str, Tensor]) -> StatisticsByGroup:
        """Those of one batch.

        Args:
            gradients: (tokens, out) by layer; those of other layers are missing.
        """
        observed = self._empty()
        for group, by_step in zip(self._groups, observed, strict=True):
            own = [gradients[name] for name in group.modules if name in gradients]
            # a router may have sent an expert nothing
            if len(own) < len(group.modules) or not len(own[0]):
                continue
            gradient = torch.cat(own, dim=1)  # (tokens, out)
            if not gradient.sum().isfinite():
                continue
            # made anew for each batch: those of all groups would be a second block
            weight = group.weight  # (out, in)
            for step, step_statistics in zip(group.stack.steps, by_step, strict=True):
                if pipeline.takes_gradient(step):
                    statistics = pipeline.observe_gradient(step, weight, gradient) or {}
                    step_statistics.update(move_statistics(statistics, group.weights_device))
        return observed

    def merge(self, by_group: StatisticsByGroup) -> None:
        """Add those of one batch to those before."""
        for merged_steps, steps in zip(self._merged, by_group, strict=True):
            for merged, step_statistics in zip(merged_steps, steps, strict=True):
                pipeline.merge(merged, step_statistics)

    def hand_over(self, statistics: GradientStatistics) -> None:
        """Put the sums of all batches where those of all blocks are kept."""
        for group, by_step in zip(self._groups, self._merged, strict=True):
            statistics.add(group.stack.name, by_step)


class _Backward:
    """Runs batches backward through a block, each in whichever thread asks for it.

    Args:
        calls: of the block, one for each batch.
        inputs: of the block.
        gradients: with respect to the block's outputs; those with respect to its inputs take their
            places.
    """

    def __init__(
        self,
        block: nn.Module,
        calls: Sequence[BlockCall],
        inputs: HiddenStates,
        gradients: HiddenStates,
        observer: _GroupObserver,
    ) -> None:
        self._block, self._calls, self._inputs = block, calls, inputs
        self._gradients, self._observer = gradients, observer
        # the outputs of the batch that a thread is at, by layer
        self._own = threading.local()
        for name, module in observer.modules.items():
            module.register_forward_hook(self._record(name))

    def run(self, position: int) -> StatisticsByGroup:
        """What is observed of one batch."""
        outputs: dict[str, Tensor] = {}
        self._own.outputs = outputs
        device = self._observer.device
        leaf = self._inputs.bring(position, device, position + 1).detach().requires_grad_()
        with torch.enable_grad():
            # blocks may change their input in place, which no leaf allows
            output = self._calls[position](self._block, leaf.clone())
        del self._own.outputs
        gradient, *layer_gradients = torch.autograd.grad(
            output,
            [leaf, *outputs.values()],
            self._gradients.bring(position, device, position + 1),
            allow_unused=True,
        )
        by_layer = {
            name: layer_gradient.flatten(0, -2)
            for name, layer_gradient in zip(outputs, layer_gradients, strict=True)
            if layer_gradient is not None
        }
        self._gradients[position] = torch.zeros_like(leaf) if gradient is None else gradient
        return self._observer.observe(by_layer)

    def _record(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        own = self._own

        def hook(module: nn.Module, arguments: object, output: Tensor) -> None:
            own.outputs[name] = output

        return hook


def _run_forward(
    block: nn.Module,
    calls: Sequence[BlockCall],
    states: HiddenStates,
    device: torch.device,
    position: int,
) -> tuple[Tensor, ExtraOutputs]:
    """What a block makes of one batch, and what else it returns."""
    return calls[position].run(block, states.bring(position, device, position + 1))
