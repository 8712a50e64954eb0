"""What every block is called with, found in one pass through a model whose blocks are stand-ins.

Works for any decoder, since nothing is known of its architecture: the model itself makes its masks,
positions and whatever else its blocks are given.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress.errors import BitpressError, CheckpointError, first_line
from bitpress.modeling.decoder import Decoder
from bitpress.modeling.hidden_states import HiddenStates
from bitpress.modeling.metrics import Head
from bitpress.runtime.devices import CPU

# What a block returns in a tuple with its output; None where the output is all it returns.
ExtraOutputs: TypeAlias = tuple[Any, ...] | None


@frozen(eq=False)
class BlockCall:
    """What a block is called with beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, block: nn.Module, hidden_states: Tensor) -> Tensor:
        """The block's output, (sequences, length, channels) as the hidden states are."""
        return self.run(block, hidden_states)[0]

    def run(self, block: nn.Module, hidden_states: Tensor) -> tuple[Tensor, ExtraOutputs]:
        """The block's output, and what else it returns."""
        returned = block(hidden_states, *self.arguments, **self.keywords)
        if isinstance(returned, tuple):
            return returned[0], tuple(returned[1:])
        return returned, None


@frozen(eq=False)
class CapturedInputs:
    """What a model gives its blocks.

    Attributes:
        hidden_states: of each batch the first block's input.
        calls: of each block, and in it of each batch.
        extra_outputs: what blocks return with their outputs.
    """

    hidden_states: HiddenStates
    calls: list[list[BlockCall]]
    extra_outputs: ExtraOutputs


def capture_inputs(
    decoder: Decoder,
    batches: Iterable[Tensor],
    folder: Path | None = None,
    states_device: torch.device = CPU,
) -> CapturedInputs:
    """Run a model up to its blocks, and note what they would be called with.

    Args:
        batches: token ids, (sequences, length) int64.
        folder: where hidden states are kept; None keeps them in memory.
        states_device: in whose memory.
    """
    device, dtype = decoder.options.device, decoder.options.dtype
    # once the first block has been run
    extra_outputs: list[ExtraOutputs] = []

    def find_extra_outputs(call: BlockCall, hidden_states: Tensor) -> ExtraOutputs:
        # some models unpack what a block returns: what that is, the first block itself says
        if not extra_outputs:
            extra_outputs.append(call.run(decoder.load_block(0), hidden_states.to(dtype))[1])
        return extra_outputs[0]

    def wrap_output(call: BlockCall, hidden_states: Tensor) -> Any:
        return _as_returned(hidden_states, find_extra_outputs(call, hidden_states))

    order: list[int] = []
    last = len(decoder) - 1
    recorders = [
        _Recorder(block, i == last, wrap_output, functools.partial(order.append, i))
        for i, block in enumerate(decoder.blocks)
    ]
    hidden_states = HiddenStates(folder=folder, device=states_device)
    with decoder.replace_blocks(recorders) as model:
        decoder.load_embeddings()
        for batch in batches:
            with contextlib.suppress(_LastBlockReached), _explain_failures(model):
                model(input_ids=batch.to(device), use_cache=False)
            _check_order(order, decoder)
            order.clear()
            first_input = recorders[0].hidden_states
            assert first_input is not None
            hidden_states.append(first_input.to(dtype))
    if not extra_outputs:
        # of one block alone, the last one's call has ended the pass
        find_extra_outputs(recorders[0].calls[0], hidden_states[0].to(device))
    calls = [recorder.calls for recorder in recorders]
    return CapturedInputs(hidden_states, calls, extra_outputs[0])


def _check_order(order: Sequence[int], decoder: Decoder) -> None:
    """Raise CheckpointError unless a model runs its blocks once each, in their order."""
    if list(order) != list(range(len(decoder))):
        raise CheckpointError(
            f"transformers' {type(decoder.model).__name__} runs its {len(decoder)} blocks in the "
            f"order {', '.join(map(str, order[:8]))}{', ...' if len(order) > 8 else ''}: only a "
            "model that runs each once, one after the other, can be calibrated; schemes and "
            "options that need no data can be used"
        )


@contextlib.contextmanager
def open_head(decoder: Decoder, extra_outputs: ExtraOutputs) -> Iterator[Head]:
    """What the model makes of its last block's outputs: (tokens, channels) -> logits (tokens,
    vocabulary); any thread may call it.

    All of the model that follows its blocks is run, whatever it is; tokens must not know each other
    there.

    Args:
        extra_outputs: what its blocks return with their output.
    """
    replayed = threading.local()
    replayers = [_Replayer(block, replayed) for block in decoder.blocks]
    with decoder.replace_blocks(replayers) as model:

        def head(hidden_states: Tensor) -> Tensor:
            batch = hidden_states.to(decoder.options.device).unsqueeze(0)  # (1, tokens, channels)
            replayed.output = _as_returned(batch, extra_outputs)
            with _explain_failures(model):
                return model(inputs_embeds=batch, use_cache=False).logits[0]  # type: ignore[no-any-return]

        yield head


@contextlib.contextmanager
def open_head_inputs(
    decoder: Decoder, head: nn.Module, extra_outputs: ExtraOutputs
) -> Iterator[Callable[[Tensor], Tensor]]:
    """What the model gives its head for its last block's outputs: (tokens, channels) -> (tokens,
    in); any thread may call it. Meanwhile the head has its weights.

    Args:
        head: the module, which is not run.
        extra_outputs: what its blocks return with their output.
    """

    def raise_inputs(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        raise _HeadReached(arguments[0].flatten(0, -2))

    handle = head.register_forward_pre_hook(raise_inputs)
    try:
        with open_head(decoder, extra_outputs) as run:
            decoder.load_module(head)

            def head_inputs(hidden_states: Tensor) -> Tensor:
                try:
                    run(hidden_states)
                except _HeadReached as reached:
                    return reached.inputs
                raise CheckpointError(
                    f"transformers' {type(decoder.model).__name__} does not call its head: it "
                    "cannot be fitted to data; options that need no data can be used for it"
                )

            yield head_inputs
    finally:
        handle.remove()


def _as_returned(output: Tensor, extra_outputs: ExtraOutputs) -> Any:
    """What a block returns that makes this output."""
    return output if extra_outputs is None else (output, *extra_outputs)


class _LastBlockReached(Exception):  # noqa: N818 (a way out, not a fault)
    """Raised when the last block has been called: what follows is not needed."""


class _HeadReached(Exception):  # noqa: N818 (a way out, not a fault)
    """Raised when the head is called, with what it is given: (tokens, in)."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


class _StandIn(nn.Module):
    """A module in a block's place, which has the block's attributes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # not a submodule: it is asked for attributes, never called
        object.__setattr__(self, "_block", block)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)


class _Recorder(_StandIn):
    """Keeps each call, and hands the hidden states on unchanged.

    Args:
        is_last: whether nothing is needed of what follows.
        wrap_output: makes of a call and the hidden states what blocks of this model return.
        note_call: is called with each call.
    """

    def __init__(
        self,
        block: nn.Module,
        is_last: bool,
        wrap_output: Callable[[BlockCall, Tensor], Any],
        note_call: Callable[[], None],
    ) -> None:
        super().__init__(block)
        self.calls: list[BlockCall] = []
        self.hidden_states: Tensor | None = None
        self._is_last, self._wrap_output = is_last, wrap_output
        self._note_call = note_call

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        if arguments:
            hidden_states, *others = arguments
        else:
            hidden_states, others = keywords.pop("hidden_states"), []
        self.hidden_states = hidden_states
        self._note_call()
        call = BlockCall(tuple(others), keywords)
        self.calls.append(_share_tensors(call, self.calls[0]) if self.calls else call)
        if self._is_last:
            raise _LastBlockReached
        return self._wrap_output(self.calls[-1], hidden_states)


class _Replayer(_StandIn):
    """Returns what the calling thread is to be given, whatever it is called with.

    Args:
        replayed: has it as `output`.
    """

    def __init__(self, block: nn.Module, replayed: threading.local) -> None:
        super().__init__(block)
        self._replayed = replayed

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self._replayed.output


@contextlib.contextmanager
def _explain_failures(model: nn.Module) -> Iterator[None]:
    """Whatever a model's own code raises becomes a CheckpointError."""
    try:
        yield
    except (_LastBlockReached, _HeadReached, BitpressError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        fact = (
            f"transformers' {type(model).__name__} cannot be run on a text alone, as it and its "
            "config.json are"
        )
        raise CheckpointError(f"{fact} ({first_line(e)})") from e


def _share_tensors(call: BlockCall, first: BlockCall) -> BlockCall:
    """The call with every tensor that the first batch's call had too, replaced by that one: masks
    and positions are held once.
    """
    first_arguments = _pad(first.arguments, len(call.arguments))
    arguments = map(_share_value, call.arguments, first_arguments)
    keywords = {
        name: _share_value(value, first.keywords.get(name)) for name, value in call.keywords.items()
    }
    return BlockCall(tuple(arguments), keywords)


def _pad(values: Sequence[Any], length: int) -> list[Any]:
    return [*values, *([None] * length)][:length]


def _share_value(value: Any, first: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(first, Tensor):
        is_alike = value.dtype == first.dtype and value.shape == first.shape
        return first if is_alike and torch.equal(value, first) else value
    if isinstance(value, tuple) and isinstance(first, tuple) and len(value) == len(first):
        return tuple(map(_share_value, value, first))
    return value
