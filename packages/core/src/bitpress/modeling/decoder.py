"""A model of any architecture that transformers knows, without its weights: they are read when they
are needed.

The model is built with its parameters on the meta device. What runs before the blocks is filled
when it is first called; blocks are filled, used and dropped one at a time.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress.checkpoint.reader import Checkpoint, Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.source import split_experts
from bitpress.errors import CheckpointError
from bitpress.modeling.build import build_model
from bitpress.modeling.host_weights import BroughtWeights, lies_on_host
from bitpress.modeling.parameter_names import map_parameters
from bitpress.runtime.devices import CPU

# Numbers of a tensor that are read together.
NUMBERS_PER_READ = 1 << 20


@frozen
class DecoderOptions:
    """How a model is built, and what it is computed with.

    Attributes:
        device: on which blocks are computed.
        dtype: in which blocks are computed, whatever the files hold.
        trust_remote_code: whether code in the model's folder may run.
        all_experts: whether experts compute every token, and not only those routed to them.
        max_brought_bytes: that the device has of the weights of blocks' linear layers, while these
            stay in the host's memory; None: blocks lie on the device.
    """

    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    trust_remote_code: bool = False
    all_experts: bool = False
    max_brought_bytes: int | None = None


class Decoder:
    """A model whose blocks are handed out one by one, their layers found by the names that they
    have in the files.

    Args:
        container: the name of the list of blocks, as in the checkpoint: `model.layers`.
        reader: reads the checkpoint's tensors.

    Raises:
        CheckpointError: transformers cannot build the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        container: str,
        reader: Reader,
        options: DecoderOptions | None = None,
    ) -> None:
        self.options = options = options or DecoderOptions()
        self.model: Any = build_model(checkpoint, options.trust_remote_code, options.dtype)

        # experts that a run leaves as they are run one by one too
        checkpoint = split_experts(checkpoint)
        parameters = map_parameters(self.model, checkpoint, container, options.all_experts)
        self.container, self.blocks = parameters.container, parameters.blocks
        self._checkpoint, self.reader = checkpoint, reader
        # by the name of a parameter in the model, that in the files
        self._names = {**parameters.names, **self._tied_head(parameters.names)}
        self._merged = parameters.merged
        self._brought_weights = None
        if options.max_brought_bytes is not None:
            self._brought_weights = BroughtWeights(options.device, options.max_brought_bytes)

        for name, module in self.model.named_modules():
            # of one that has buffers alone, these are moved to the device
            is_filled = any(True for _ in (*module.parameters(False), *module.buffers(False)))
            if is_filled and not name.startswith(f"{self.container}."):
                module.register_forward_pre_hook(self._fill_before_forward(name))

    def __len__(self) -> int:
        return len(self.blocks)

    def load_block(self, index: int) -> nn.Module:
        """A copy of a block with its weights: on the device, or brought there layer by layer.

        The system reads the next block into its cache meanwhile.
        """
        block = copy.deepcopy(self.blocks[index])
        if self._brought_weights is not None:
            self._brought_weights.take(block)
        self._fill(block, f"{self.container}.{index}")
        if index + 1 < len(self):
            self._expect(f"{self.container}.{index + 1}", self.blocks[index + 1])
        return block

    def copy_block(self, index: int, block: nn.Module) -> nn.Module:
        """Another copy of a block that is as it was loaded. Its weights are not read again, unless
        they stay in the host's memory, where they lie as a GPU needs them.
        """
        return copy.deepcopy(block) if self._brought_weights is None else self.load_block(index)

    def load_embeddings(self) -> None:
        """Fill what reads the tokens: some models ask it for its device before they call it."""
        self.load_module(self.model.get_input_embeddings())

    def load_module(self, module: nn.Module) -> None:
        """Fill the parameters of a module outside the blocks, before it is called."""
        name = next(name for name, other in self.model.named_modules() if other is module)
        self._fill(module, name, recurse=False)

    def find_layer(self, name: str) -> nn.Module | None:
        """The module that computes with a layer of the files; None where there is none.

        Args:
            name: of the layer in the files, without `.weight`.
        """
        names = (x for x, in_files in self._names.items() if in_files == f"{name}.weight")
        found = next(names, None)
        return None if found is None else self.model.get_submodule(found.removesuffix(".weight"))

    @contextlib.contextmanager
    def replace_blocks(self, stand_ins: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """The whole model with other modules where its blocks are; weights that were filled
        meanwhile are dropped afterwards.
        """
        blocks = self.model.get_submodule(self.container)
        assert isinstance(blocks, nn.ModuleList)
        for i, stand_in in enumerate(stand_ins):
            blocks[i] = stand_in
        try:
            yield self.model
        finally:
            for i, block in enumerate(self.blocks):
                blocks[i] = block
            for module in self.model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    on_meta = nn.Parameter(parameter.to("meta"), requires_grad=False)
                    setattr(module, name, on_meta)

    def require_parameters(self) -> None:
        """Raise CheckpointError naming the first parameter that the files do not hold."""
        self.require_blocks()
        for name, parameter in self.model.named_parameters():
            if not name.startswith(f"{self.container}."):
                self._find_entry(name, tuple(parameter.shape))

    def require_blocks(self) -> None:
        """The same of parameters of the blocks alone."""
        for index, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters():
                self._find_entry(f"{self.container}.{index}.{name}", tuple(parameter.shape))

    def _fill_before_forward(self, name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            self._fill(module, name, recurse=False)

        return hook

    def _fill(self, module: nn.Module, prefix: str, recurse: bool = True) -> None:
        for name, parameter in list(module.named_parameters(recurse=recurse)):
            if parameter.is_meta:
                owner, _, leaf = name.rpartition(".")
                submodule, shape = module.get_submodule(owner), tuple(parameter.shape)
                weight = self._read(f"{prefix}.{name}", shape, lies_on_host(submodule, leaf))
                setattr(submodule, leaf, nn.Parameter(weight, requires_grad=False))

        # buffers are computed when a model is built; files hold only some of them
        for name, buffer in list(module.named_buffers(recurse=recurse)):
            entry = self._checkpoint.entries.get(self._names.get(f"{prefix}.{name}", ""))
            tensor = buffer if entry is None else self.reader.whole(entry).to(buffer.dtype)
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._buffers[leaf] = tensor.to(self.options.device)

    def _expect(self, prefix: str, module: nn.Module) -> None:
        for name, _ in module.named_parameters():
            entry = self._checkpoint.entries.get(self._names.get(f"{prefix}.{name}", ""))
            if entry is not None:
                self.reader.expect(entry)

    def _tied_head(self, names: Mapping[str, str]) -> dict[str, str]:
        """The head's weight by the name of the embeddings' in the files, where they are one."""
        modules = {module: f"{name}.weight" for name, module in self.model.named_modules()}
        try:
            head = modules.get(self.model.get_output_embeddings())
            embeddings = modules.get(self.model.get_input_embeddings())
        except NotImplementedError:
            raise CheckpointError(
                f"{self._checkpoint.folder}: transformers' {type(self.model).__name__} does not "
                "say which embeddings are those of its text: a model of this layout cannot be run "
                "yet; schemes and options that need no data can be used"
            ) from None
        configs = (self.model.config, self.model.config.get_text_config())
        is_tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
        if not is_tied or head is None or embeddings is None:
            return {}
        return {head: names[embeddings]} if embeddings in names and head not in names else {}

    def _find_entry(self, name: str, shape: tuple[int, ...]) -> Entry:
        entry = self._checkpoint.entries.get(self._names.get(name, ""))
        if name in self._merged:
            fault = f"is made of {' and '.join(self._merged[name])} while these are loaded"
        elif entry is None:
            fault = "is not in the files"
        elif entry.shape != shape:
            fault = f"has the shape {list(entry.shape)} and not {list(shape)}"
        else:
            return entry
        raise CheckpointError(
            f"{self._checkpoint.folder}: tensor {name}, which transformers' "
            f"{type(self.model).__name__} needs, {fault}: a model of this layout cannot be run "
            "yet; schemes and options that need no data can be used"
        )

    def _read(self, name: str, shape: tuple[int, ...], on_host: bool) -> Tensor:
        entry = self._find_entry(name, shape)
        device = CPU if on_host else self.options.device
        # from there a GPU copies without a detour
        is_pinned = on_host and self.options.device.type == "cuda"
        tensor = torch.empty(shape, dtype=self.options.dtype, device=device, pin_memory=is_pinned)
        # In parts: a vocabulary's embeddings take gigabytes.
        rows = tensor if shape else tensor.unsqueeze(0)
        num_rows = max(NUMBERS_PER_READ // max(math.prod(shape[1:]), 1), 1)
        parts, first, sums = torch.split(rows, num_rows), 0, []
        for part in parts:
            part.copy_(self.reader.rows(entry, first, first + len(part), part.device))
            first += len(part)
            # A finite sum has finite terms. It is not taken in float64: torch would copy the part,
            # and a heap in which weights lie between such copies is twice as large.
            sums.append(part.sum())
        # once for all parts: until then a GPU copies one while the next is read
        if not torch.stack(sums).isfinite().all() and not all(p.isfinite().all() for p in parts):
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor {name} holds NaN or infinity: the source is "
                "damaged; fetch it again"
            )
        return tensor
