"""What every block is called with, noted in one pass through a model whose blocks are stand-ins.

Works for any decoder, since nothing is known of its architecture: the model itself makes its masks,
positions and whatever else its blocks are given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress.errors import BitpressError, CheckpointError, first_line
from bitpress.modeling.decoder import Decoder
from bitpress.modeling.hidden_states import States


@frozen(eq=False)
class Call:
    """What a block is called with beside the hidden states."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output."""
        found = self.whole(block, hidden)
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]

    def whole(self, block: nn.Module, hidden: Tensor) -> Any:
        """All that the block returns; some wrap their output in a tuple."""
        return block(hidden, *self.arguments, **self.keywords)


@frozen(eq=False)
class Recording:
    """Per batch the first block's input, and per block and batch its call."""

    hidden: States
    calls: list[list[Call]]


class _LastBlockReached(Exception):  # noqa: N818 (a way out, not a fault)
    """Raised when the last block has been called: what follows is not needed."""


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
    """Notes the call and hands the hidden states on unchanged.

    Args:
        form: makes of hidden states, and of the call with them, what the blocks of this model
            return.
    """

    def __init__(self, block: nn.Module, last: bool, form: Callable[[Call, Tensor], Any]) -> None:
        super().__init__(block)
        self.calls: list[Call] = []
        self.hidden: Tensor | None = None
        self._last, self._form = last, form

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Note the call."""
        if arguments:
            hidden, arguments = arguments[0], arguments[1:]
        else:
            hidden = keywords.pop("hidden_states")
        self.hidden = hidden
        self.calls.append(_shared(Call(arguments, keywords), self.calls[0] if self.calls else None))
        if self._last:
            raise _LastBlockReached
        return self._form(self.calls[-1], hidden)


class _Replayer(_StandIn):
    """Returns what it was told to, whatever it is called with."""

    output: Any = None

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """What was told."""
        return self.output


@contextlib.contextmanager
def head(decoder: Decoder, beside: tuple[Any, ...] | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """What the model makes of its last block's outputs: (tokens, channels) -> logits (tokens,
    vocabulary).

    All of the model that follows its blocks is run, whatever it is; tokens must not know each other
    there.

    Args:
        beside: what the blocks return in a tuple with their output; None where that is all.
    """
    replayers = [_Replayer(block) for block in decoder.blocks]
    with decoder.instead_of_blocks(list(replayers)) as model:

        def logits(hidden: Tensor) -> Tensor:
            batch = hidden.unsqueeze(0)
            for replayer in replayers:
                replayer.output = batch if beside is None else (batch, *beside)
            with _running(model):
                return model(inputs_embeds=batch, use_cache=False).logits[0]  # type: ignore[no-any-return]

        yield logits


def record(
    decoder: Decoder,
    batches: Iterable[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    folder: Path | None = None,
) -> Recording:
    """The recording of all batches (sequences, length) of token ids; hidden states are kept on the
    CPU, or in a file.
    """
    # what blocks return beside the hidden states; None where that is all
    others: list[tuple[Any, ...] | None] = []

    def form(call: Call, given: Tensor) -> Any:
        # asked of the first block, since the model may unpack what it is given
        if not others:
            found = call.whole(decoder.block(0), given.to(dtype))
            others.append(tuple(found[1:]) if isinstance(found, tuple) else None)
        return given if others[0] is None else (given, *others[0])

    recorders = [
        _Recorder(block, i == len(decoder) - 1, form) for i, block in enumerate(decoder.blocks)
    ]
    hidden = States(folder=folder)
    with decoder.instead_of_blocks(list(recorders)) as model:
        decoder.fill_embeddings()
        for batch in batches:
            try:
                with _running(model):
                    model(input_ids=batch.to(device), use_cache=False)
            except _LastBlockReached:
                first = recorders[0].hidden
                assert first is not None
                hidden.append(first.to(dtype).cpu())
    return Recording(hidden, [recorder.calls for recorder in recorders])


@contextlib.contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """Whatever a model's own code raises is told as the model's fault."""
    try:
        yield
    except (_LastBlockReached, BitpressError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        fact = (
            f"transformers' {type(model).__name__} cannot be run on a text alone, as it and its "
            "config.json are"
        )
        raise CheckpointError(f"{fact} ({first_line(e)})") from e


def _shared(call: Call, first: Call | None) -> Call:
    """The call with every tensor that the first batch's call had too, replaced by that one: masks
    and positions are kept once.
    """
    if first is None:
        return call
    arguments = tuple(
        _same(a, b)
        for a, b in zip(call.arguments, _padded(first.arguments, len(call.arguments)), strict=True)
    )
    return Call(
        arguments,
        {name: _same(value, first.keywords.get(name)) for name, value in call.keywords.items()},
    )


def _padded(values: Sequence[Any], count: int) -> list[Any]:
    return [*values, *([None] * count)][:count]


def _same(value: Any, known: Any) -> Any:
    if isinstance(value, Tensor) and isinstance(known, Tensor):
        same = (
            value.dtype == known.dtype and value.shape == known.shape and torch.equal(value, known)
        )
        return known if same else value
    if isinstance(value, tuple) and isinstance(known, tuple) and len(value) == len(known):
        return tuple(_same(a, b) for a, b in zip(value, known, strict=True))
    return value
