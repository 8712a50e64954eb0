"""A model run on batches of tokens, one decoder block in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from attrs import field, frozen
from torch import Tensor, nn

from bitpress.checkpoint.reader import Checkpoint, Reader
from bitpress.modeling.attention import watch
from bitpress.modeling.capture import BlockCall, ExtraOutputs, capture_inputs
from bitpress.modeling.decoder import Decoder, DecoderOptions
from bitpress.runtime.lanes import Lanes
from bitpress.schemes.activation_quantizer import ActivationQuantizer, quantize_arguments
from bitpress.schemes.attention_cache import CacheQuantizer


@frozen(eq=False)
class RunnableModel:
    """A model that can be run.

    Attributes:
        checkpoint: its tensors as they are computed with.
        reader: reads them.
        container: the name of the list of decoder blocks.
        activation_quantizers: by layer, what is made of its inputs (tokens, in) before it computes
            with them; none in a model whose activations are not quantized.
        cache_quantizers: by attention, what is made of its keys and values.
    """

    checkpoint: Checkpoint
    reader: Reader
    container: str
    activation_quantizers: Mapping[str, ActivationQuantizer] = field(factory=dict)
    cache_quantizers: Mapping[str, CacheQuantizer] = field(factory=dict)


class BlockRunner:
    """Batches on their way through the blocks of a model.

    Blocks are run in order, each on whichever hidden states it is given the numbers of.

    Args:
        batches: token ids, (sequences, length) int64.
        folder: where hidden states are kept; None keeps them in memory.
        lanes: batches are run side by side in these; None: one after the other.

    Attributes:
        hidden_states: of the batches, and of what was forked from them.
        extra_outputs: what the block that ran last returned with its output.

    Raises:
        CheckpointError: transformers cannot build the model, or the model cannot be run.
    """

    def __init__(
        self,
        model: RunnableModel,
        batches: Iterable[Tensor],
        options: DecoderOptions,
        folder: Path | None = None,
        *,
        lanes: Lanes | None = None,
    ) -> None:
        self.decoder = build_decoder(model, options)
        self.extra_outputs: ExtraOutputs = None
        self._model, self._lanes = model, lanes or Lanes()
        inputs = capture_inputs(self.decoder, batches, folder)
        self.hidden_states, self._calls = inputs.hidden_states, inputs.calls

    def __len__(self) -> int:
        """Blocks of the model."""
        return len(self.decoder)

    def load_block(self, index: int) -> nn.Module:
        """A copy of a block that computes as it is served, its activations quantized, and inside
        `watched_attention` its keys and values too.
        """
        block = self.decoder.load_block(index)
        prefix = f"{self._model.container}.{index}."
        for name, quantize in self._model.activation_quantizers.items():
            if name.startswith(prefix):
                module = block.get_submodule(name.removeprefix(prefix))
                module.register_forward_pre_hook(_quantize_input(quantize))
        for name, quantize_cache in self._model.cache_quantizers.items():
            if name.startswith(prefix):
                watch(block.get_submodule(name.removeprefix(prefix)), quantize_cache)
        return block

    def take_calls(self, index: int) -> list[BlockCall]:
        """What a block is called with, batch by batch; they are handed out once, and not held."""
        calls, self._calls[index] = self._calls[index], []
        return calls

    def tokens(self, number: int) -> Tensor:
        """Hidden states by their number, (tokens, channels), on the device that computes."""
        return self.hidden_states.bring(number, self.decoder.options.device).flatten(0, -2)

    def run(self, block: nn.Module, calls: Sequence[BlockCall], numbers: Sequence[int]) -> None:
        """Replace hidden states by what a block makes of them.

        Args:
            calls: of their batches.
            numbers: of the hidden states.
        """
        for number, output in zip(numbers, self._outputs(block, calls, numbers), strict=True):
            self.hidden_states[number] = output

    def fork(self, block: nn.Module, calls: Sequence[BlockCall], numbers: Sequence[int]) -> range:
        """As `run`, but hidden states stay as they are; returns the numbers of the outputs."""
        first = len(self.hidden_states)
        for output in self._outputs(block, calls, numbers):
            self.hidden_states.append(output.cpu())
        return range(first, len(self.hidden_states))

    def _outputs(
        self, block: nn.Module, calls: Sequence[BlockCall], numbers: Sequence[int]
    ) -> Iterator[Tensor]:
        batches = zip(numbers, calls, [*numbers[1:], None], strict=True)
        run = functools.partial(self._run_batch, block)
        for output, extra_outputs in self._lanes.map(run, batches):
            self.extra_outputs = extra_outputs
            yield output

    def _run_batch(
        self, block: nn.Module, batch: tuple[int, BlockCall, int | None]
    ) -> tuple[Tensor, ExtraOutputs]:
        number, call, following = batch
        device = self.decoder.options.device
        return call.run(block, self.hidden_states.bring(number, device, following))


def build_decoder(model: RunnableModel, options: DecoderOptions) -> Decoder:
    """A model whose layers outside the blocks compute as they are served: its head, whose inputs
    may be quantized.

    Raises:
        CheckpointError: transformers cannot build the model.
    """
    decoder = Decoder(model.checkpoint, model.container, model.reader, options)
    for name, quantize in model.activation_quantizers.items():
        layer = None
        if not name.startswith(f"{model.container}."):
            layer = decoder.find_layer(name)
        if layer is not None:
            layer.register_forward_pre_hook(_quantize_input(quantize))
    return decoder


def _quantize_input(
    quantize: ActivationQuantizer,
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that quantizes what a layer is given."""

    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return quantize_arguments(quantize, arguments)

    return hook
