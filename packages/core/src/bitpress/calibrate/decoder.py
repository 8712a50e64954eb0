"""A model of any architecture that transformers knows, without its weights: they are read when they are needed.

The model is built with its parameters on the meta device. What runs before the blocks is filled when it is first called; blocks
are filled, used and dropped one at a time.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bitpress import stacks
from bitpress.checkpoint.header import Entry
from bitpress.checkpoint.reader import Checkpoint, Reader
from bitpress.errors import CheckpointError
from bitpress.quantization import KEY


class Decoder:
    """A model whose blocks are handed out one by one.

    Args:
        container: the name of the list of blocks, as in the checkpoint: `model.layers`.
        dtype: what the weights are computed with.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        container: str,
        reader: Reader,
        device: torch.device,
        dtype: torch.dtype,
        trust: bool = False,
    ) -> None:
        self.model: Any = _build(checkpoint, trust)
        self.container = container
        self._checkpoint, self._reader, self._device, self._dtype = checkpoint, reader, device, dtype
        try:
            blocks = self.model.get_submodule(container)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList):
            raise CheckpointError(
                f"{checkpoint.folder}: transformers' {type(self.model).__name__} has no list of blocks {container!r}, "
                "under which the files name their layers: this layout cannot be calibrated yet"
            )
        self.blocks = list(blocks)
        self._names = self._head_name()
        for name, module in self.model.named_modules():
            if not name.startswith(container) and next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(self._filler(name))

    def __len__(self) -> int:
        return len(self.blocks)

    def block(self, index: int) -> nn.Module:
        """A block with its weights, a copy of its own."""
        module = copy.deepcopy(self.blocks[index])
        self._fill(module, f"{self.container}.{index}")
        return module

    @contextlib.contextmanager
    def instead_of_blocks(self, stand_ins: list[nn.Module]) -> Iterator[nn.Module]:
        """The whole model with other modules where its blocks are; what was filled is dropped again afterwards."""
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
                setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=recurse)):
            owner, _, leaf = name.rpartition(".")
            entry = self._checkpoint.entries.get(f"{prefix}.{name}")
            tensor = buffer if entry is None else self._reader.whole(entry).to(buffer.dtype)
            module.get_submodule(owner)._buffers[leaf] = tensor.to(self._device)

    def _head_name(self) -> dict[str, str]:
        """The head's weight by the name that it has in the files, where that is another: the embeddings', if they are tied, or an
        older one, which is that of the one tensor of its shape that belongs to nothing else.
        """
        modules = {module: f"{name}.weight" for name, module in self.model.named_modules()}
        head, embeddings = (modules.get(get()) for get in (self.model.get_output_embeddings, self.model.get_input_embeddings))
        if head is None or embeddings is None or head in self._checkpoint.entries:
            return {}
        if self.model.config.get_text_config().tie_word_embeddings:
            return {head: embeddings}
        shape, known = self.model.get_parameter(head).shape, {name for name, _ in self.model.named_parameters()}
        others = [name for name, entry in self._checkpoint.entries.items() if entry.shape == shape and name not in known]
        return {head: others[0]} if len(others) == 1 else {}

    def require(self) -> None:
        """See that the files hold every parameter; raises CheckpointError naming the first that they do not."""
        for index, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters():
                self._entry(f"{self.container}.{index}.{name}", tuple(parameter.shape))
        for name, parameter in self.model.named_parameters():
            if not name.startswith(f"{self.container}."):
                self._entry(name, tuple(parameter.shape))

    def _entry(self, name: str, shape: tuple[int, ...]) -> Entry:
        entry = self._checkpoint.entries.get(self._names.get(name, name))
        if entry is None or entry.shape != shape:
            found = "is not in the files" if entry is None else f"has the shape {list(entry.shape)} and not {list(shape)}"
            raise CheckpointError(
                f"{self._checkpoint.folder}: tensor {name}, which transformers' {type(self.model).__name__} needs, {found}: "
                "a model of this layout cannot be run yet; schemes and options that need no data can be used"
            )
        return entry

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        entry = self._entry(name, shape)
        tensor = self._reader.whole(entry).to(self._device, self._dtype)
        if not math.isfinite(tensor.sum(dtype=torch.float64)):
            place = self._checkpoint.folder
            raise CheckpointError(f"{place}: tensor {name} holds NaN or infinity: the source is damaged; fetch it again")
        return tensor


def _build(checkpoint: Checkpoint, trust: bool) -> nn.Module:
    """The model on the meta device; buffers, which are computed and not stored, are real."""
    import transformers

    count = stacks.block_count(checkpoint.config)
    if count is not None and count > len(checkpoint.entries):  # building them would go on for ever
        raise CheckpointError(f"{checkpoint.folder}: config.json says {count} blocks, and the files hold fewer tensors than that")
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust)
        config.__dict__.pop(KEY, None)  # weights are given as they are computed with
        with _parameters_on_meta():
            build: Callable[..., nn.Module] = transformers.AutoModelForCausalLM.from_config
            model = build(config, trust_remote_code=trust)
    except Exception as e:  # whatever its parsers and its models raise for a config that is not what it says
        text = re.sub(r"\s+", " ", str(e)).strip()
        hint = "" if trust or "trust_remote_code" not in text else "; --trust-remote-code allows the model's own code"
        raise CheckpointError(f"{checkpoint.folder}: transformers cannot build the model: {text[:300]}{hint}") from None
    return model.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters lose their numbers as soon as they are registered, and none are drawn: no weight is ever in memory."""
    register, drawing = nn.Module.register_parameter, False
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    initialisers = {name: getattr(nn.init, name) for name in names}

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, None if parameter is None else nn.Parameter(parameter.to("meta"), requires_grad=False))

    def undrawn(initialiser: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Whoever is imported meanwhile may keep it for good, so that it has to work afterwards."""
        return lambda tensor, *args, **kwargs: initialiser(tensor, *args, **kwargs) if drawing else tensor

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    for name in names:
        setattr(nn.init, name, undrawn(initialisers[name]))
    try:
        yield
    finally:
        drawing = True
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        for name, function in initialisers.items():
            setattr(nn.init, name, function)
