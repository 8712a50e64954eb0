"""Forward passes of one decoder block that stop before its layer groups, and go on when these have
been compressed.

A forward pass is a coroutine of its own (greenlet): when it comes to a layer group it hands the
group's input out and stops there. Resumed from there, a block costs one forward pass however many
groups it has, and a stopped one holds a few tensors for each token; abandoned, it is run from the
block's start for every group, and holds nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import greenlet
import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress.modeling.capture import BlockCall
from bitpress.modeling.experts import ROUTED_TOKENS, find_expert_layer

# Part of a block's output by which a sum of its layers' outputs may differ from it: additions in
# another order round otherwise.
SUM_TOLERANCE = 1e-5

# The last layers of a block that are tried as those whose outputs it adds to its input: every
# subset of them is.
MAX_RESIDUAL_CANDIDATES = 6


@frozen(eq=False)
class Stop:
    """What a forward pass hands out where it stops.

    Attributes:
        number: of the breakpoint.
        inputs: (tokens, in) what is given to the layer there.
        routed_tokens: (tokens,) the numbers, ascending, of these tokens in the batch, where a
            router has chosen them; None where they are all.
        residual_stream: (tokens, channels) by then, of all tokens; None where it is not tracked.
    """

    number: int
    inputs: Tensor
    routed_tokens: Tensor | None = None
    residual_stream: Tensor | None = None


class _ForwardGreenlet(greenlet.greenlet):
    """A forward pass of a block.

    Nothing that it runs holds it, so that one that is abandoned ends at once, and lets go of the
    block.

    Attributes:
        batch: the number of the batch.
        residual_stream: the block's input and what its layers have added to it so far; None where
            that is not tracked.
    """

    batch: int | None = None
    residual_stream: Tensor | None = None

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        read_hidden_states: Callable[[], Tensor],
        tracks_residual: bool,
    ) -> None:
        super().__init__(
            functools.partial(_run_block, block, call, read_hidden_states, tracks_residual)
        )


def _run_block(
    block: nn.Module,
    call: BlockCall,
    read_hidden_states: Callable[[], Tensor],
    tracks_residual: bool,
) -> Tensor:
    hidden_states = read_hidden_states()
    if tracks_residual:
        greenlet.getcurrent().residual_stream = hidden_states  # type: ignore[attr-defined]
    return call(block, hidden_states)


class ResumableForward:
    """One batch's forward pass through a block, which stops at the block's breakpoints.

    It belongs to the thread that starts it: no other can go on with it.

    Args:
        read_hidden_states: reads the batch's input of the block, at every start.
        tracks_residual: whether what layers add to the block's input is added up on the way.
        batch: its number, by which what is observed on the way is told apart.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        read_hidden_states: Callable[[], Tensor],
        tracks_residual: bool = False,
        *,
        batch: int | None = None,
    ) -> None:
        def start() -> _ForwardGreenlet:
            forward = _ForwardGreenlet(block, call, read_hidden_states, tracks_residual)
            forward.batch = batch
            return forward

        self._start = start
        self._greenlet: _ForwardGreenlet | None = None
        self._stop: Stop | None = None

    def advance(self, breakpoint_number: int, is_resumed: bool) -> Stop | None:
        """Where it stops at a breakpoint, None where it does not come to it; breakpoints are asked
        for in their order.

        Args:
            is_resumed: stop there, and go on from there the next time; otherwise the forward pass
                is abandoned, and starts anew the next time.
        """
        forward = self._greenlet or self._start()
        stop = self._stop
        while (stop is None or stop.number < breakpoint_number) and not forward.dead:
            result = forward.switch()
            if not forward.dead:
                stop = result

        if is_resumed:
            self._greenlet, self._stop = forward, stop
        else:
            self._stop = None
            forward.throw()
        return stop if stop is not None and stop.number == breakpoint_number else None

    def abandon(self) -> None:
        """Let go of what a stopped forward pass holds; a thread has to end those that it has
        begun.
        """
        if self._greenlet is not None:
            self._greenlet.throw()
        self._greenlet, self._stop = None, None

    def finish(self) -> Tensor:
        """Go on to the block's output."""
        forward = self._greenlet or self._start()
        self._greenlet, self._stop = None, None
        while True:
            result = forward.switch()
            if forward.dead:
                return result  # type: ignore[no-any-return]


class Breakpoints:
    """Where the forward passes of a block stop, and where they add up the residual stream.

    Args:
        layers: by number, the layers before which they stop.
        residual_layers: layers whose outputs are added to the block's input.
    """

    def __init__(
        self, block: nn.Module, layers: Sequence[str], residual_layers: Sequence[str] = ()
    ) -> None:
        self._removals: list[Callable[[], object]] = []
        for number, name in enumerate(layers):
            expert_layer = find_expert_layer(block, name)
            if expert_layer is not None:
                hooks = expert_layer.experts.arrival_hooks
                hooks[expert_layer.name] = functools.partial(_stop, number)
                self._removals.append(functools.partial(hooks.pop, expert_layer.name))
                continue

            def stop(
                module: nn.Module, arguments: tuple[Tensor, ...], number: int = number
            ) -> None:
                _stop(number, arguments[0])

            handle = block.get_submodule(name).register_forward_pre_hook(stop)
            self._removals.append(handle.remove)
        for name in residual_layers:
            handle = block.get_submodule(name).register_forward_hook(_add_to_residual_stream)
            self._removals.append(handle.remove)

    def remove(self) -> None:
        """Let forward passes run through again."""
        for remove in self._removals:
            remove()


def _stop(number: int, inputs: Tensor) -> None:
    """Hand a layer's inputs (..., in) to whoever waits for the current forward pass."""
    # other forward passes go through: those that trace a block or check a fold
    asker, residual_stream = _find_asker()
    if asker is not None:
        # this frame must not hold the forward pass that it belongs to
        asker.switch(Stop(number, inputs.flatten(0, -2), ROUTED_TOKENS.get(), residual_stream))


def current_batch() -> int | None:
    """The number of the batch whose forward pass runs here; None in one that runs through."""
    forward = greenlet.getcurrent()
    return forward.batch if isinstance(forward, _ForwardGreenlet) else None


def _find_asker() -> tuple[greenlet.greenlet | None, Tensor | None]:
    """Who waits for what the current forward pass hands out, None in one that runs through; and
    its residual stream, (tokens, channels).
    """
    forward = greenlet.getcurrent()
    if not isinstance(forward, _ForwardGreenlet):
        return None, None
    stream = forward.residual_stream
    return forward.parent, None if stream is None else stream.flatten(0, -2)


def _add_to_residual_stream(
    module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor
) -> None:
    forward = greenlet.getcurrent()
    if isinstance(forward, _ForwardGreenlet) and forward.residual_stream is not None:
        # some blocks have flattened all tokens into one axis
        residual_stream = forward.residual_stream
        forward.residual_stream = residual_stream + output.view_as(residual_stream)


@frozen
class ForwardTrace:
    """How a forward pass goes through a block.

    Attributes:
        called_layers: those of the traced layers that it calls, in the order of their first calls.
        residual_layers: those of them whose outputs, added to the block's input, make its output;
            none where it is made otherwise.
    """

    called_layers: tuple[str, ...]
    residual_layers: tuple[str, ...]


def trace_forward(
    block: nn.Module, layers: Sequence[str], call: BlockCall, hidden_states: Tensor
) -> ForwardTrace:
    """Trace a forward pass by running one.

    Args:
        layers: whose calls are traced, by their names within the block.
    """
    # by layer, in the order of calls; None where the output has not the shape of hidden states
    outputs: dict[str, Tensor | None] = {}

    def trace_calls(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if name in outputs:
                return
            outputs[name] = None
            if output.numel() == hidden_states.numel():
                # cloned: some blocks add to a layer's output in place
                outputs[name] = output.reshape(hidden_states.shape).clone()

        return hook

    handles = [
        block.get_submodule(name).register_forward_hook(trace_calls(name)) for name in layers
    ]
    block_output = call(block, hidden_states)
    for handle in handles:
        handle.remove()

    candidates = {name: output for name, output in outputs.items() if output is not None}
    residual_layers = _find_residual_layers(candidates, hidden_states, block_output)
    return ForwardTrace(tuple(outputs), residual_layers)


def _find_residual_layers(
    outputs: Mapping[str, Tensor], hidden_states: Tensor, block_output: Tensor
) -> tuple[str, ...]:
    """The most layers whose outputs, added to a block's input, are its output."""
    candidates = list(outputs)[-MAX_RESIDUAL_CANDIDATES:]
    for count in range(len(candidates), 0, -1):
        for names in itertools.combinations(candidates, count):
            difference = block_output - sum((outputs[name] for name in names), hidden_states)
            if torch.linalg.norm(difference) <= SUM_TOLERANCE * torch.linalg.norm(block_output):
                return names
    return ()
