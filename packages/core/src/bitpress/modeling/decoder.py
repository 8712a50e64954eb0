"""A model of any architecture that transformers knows, without its weights: they are read when they
are needed.

The model is built with its parameters on the meta device. What runs before the blocks is filled
when it is first called; blocks are filled, used and dropped one at a time.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from bitpress.checkpoint.reader import Checkpoint, Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.source import split_experts
from bitpress.errors import CheckpointError
from bitpress.modeling.build import build
from bitpress.modeling.parameter_names import lay_out


class Decoder:
    """A model whose blocks are handed out one by one, their layers found by the names that they
    have in the files.

    Args:
        container: the name of the list of blocks, as in the checkpoint: `model.layers`.
        dtype: what the weights are computed with.
        everything: whether experts compute every token, and not only those that come to them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        container: str,
        reader: Reader,
        device: torch.device,
        dtype: torch.dtype,
        trust: bool = False,
        everything: bool = False,
    ) -> None:
        self.model: Any = build(checkpoint, trust, dtype)
        # also of experts that a run leaves as they are
        checkpoint = split_experts(checkpoint)
        layout = lay_out(self.model, checkpoint, container, everything)
        self.container, self.blocks = layout.container, layout.blocks
        self._checkpoint, self._reader, self._device, self._dtype = (
            checkpoint,
            reader,
            device,
            dtype,
        )
        self._names = {**layout.names, **self._tied(layout.names)}
        for name, module in self.model.named_modules():
            if (
                not name.startswith(f"{self.container}.")
                and next(module.parameters(recurse=False), None) is not None
            ):
                module.register_forward_pre_hook(self._filler(name))

    def __len__(self) -> int:
        return len(self.blocks)

    def block(self, index: int) -> nn.Module:
        """A block with its weights, a copy of its own."""
        module = copy.deepcopy(self.blocks[index])
        self._fill(module, f"{self.container}.{index}")
        return module

    def fill_embeddings(self) -> None:
        """Fill what reads the tokens: some models ask it for its device before they call it."""
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._fill(embeddings, name, recurse=False)

    @contextlib.contextmanager
    def instead_of_blocks(self, stand_ins: list[nn.Module]) -> Iterator[nn.Module]:
        """The whole model with other modules where its blocks are; what was filled is dropped again
        afterwards.
        """
        blocks = self.model.get_submodule(self.container)
        assert isinstance(blocks, nn.ModuleList)
        for i, module in enumerate(stand_ins):
            blocks[i] = module
        try:
            yield self.model
        finally:
            for i, module in enumerate(self.blocks):
                blocks[i] = module
            for module in self.model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    def _filler(self, name: str) -> Any:
        def fill(module: nn.Module, arguments: Any) -> None:
            self._fill(module, name, recurse=False)

        return fill

    def _fill(self, module: nn.Module, prefix: str, recurse: bool = True) -> None:
        for name, parameter in list(module.named_parameters(recurse=recurse)):
            if parameter.is_meta:
                tensor = self._read(f"{prefix}.{name}", tuple(parameter.shape))
                owner, _, leaf = name.rpartition(".")
                setattr(
                    module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False)
                )
        for name, buffer in list(module.named_buffers(recurse=recurse)):
            owner, _, leaf = name.rpartition(".")
            entry = self._checkpoint.entries.get(self._names.get(f"{prefix}.{name}", ""))
            tensor = buffer if entry is None else self._reader.whole(entry).to(buffer.dtype)
            module.get_submodule(owner)._buffers[leaf] = tensor.to(self._device)

    def _tied(self, names: Mapping[str, str]) -> dict[str, str]:
        """The head's weight by the name of the embeddings' in the files, where they are one."""
        modules = {module: f"{name}.weight" for name, module in self.model.named_modules()}
        head, embeddings = (
            modules.get(get())
            for get in (self.model.get_output_embeddings, self.model.get_input_embeddings)
        )
        configs = (self.model.config, self.model.config.get_text_config())
        tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
        if (
            not tied
            or head is None
            or embeddings is None
            or embeddings not in names
            or head in names
        ):
            return {}
        return {head: names[embeddings]}

    def require(self) -> None:
        """See that the files hold every parameter; raises CheckpointError naming the first that
        they do not.
        """
        for index, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters():
                self._entry(f"{self.container}.{index}.{name}", tuple(parameter.shape))
        for name, parameter in self.model.named_parameters():
            if not name.startswith(f"{self.container}."):
                self._entry(name, tuple(parameter.shape))

    def _entry(self, name: str, shape: tuple[int, ...]) -> Entry:
        entry = self._checkpoint.entries.get(self._names.get(name, ""))
        if entry is None or entry.shape != shape:
            found = (
                "is not in the files"
                if entry is None
                else f"has the shape {list(entry.shape)} and not {list(shape)}"
            )
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor {name}, which transformers' "
                f"{type(self.model).__name__} needs, {found}: a model of this layout cannot be run "
                "yet; schemes and options that need no data can be used"
            )
        return entry

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        entry = self._entry(name, shape)
        tensor = self._reader.whole(entry).to(self._device, self._dtype)
        if not math.isfinite(tensor.sum(dtype=torch.float64)):
            place = self._checkpoint.folder
            raise CheckpointError(
                f"{place}: tensor {name} holds NaN or infinity: the source is damaged; fetch it "
                "again"
            )
        return tensor
