"""Experts, which transformers keeps in one tensor, as linear layers of their own: each is given the
tokens that come to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitpress.checkpoint.layer_names import EXPERT
from bitpress.errors import CheckpointError

# by expert and name of its layer, the weight's (out, in)
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]


class Experts(nn.Module):
    """In place of a module that computes a block's experts from fused weights:
    `experts.0.gate_proj` is a layer of the first.

    Every layer is called in every forward, maybe with no token at all, so that a forward passes all
    of them.

    Args:
        fused: what it stands for.
        shapes: of the layers as the files have them.
        everything: whether each expert computes every token; the output is the same.

    Raises:
        CheckpointError: it computes in a way that is not known here, or experts are missing; `name`
            is named.
    """

    def __init__(
        self, name: str, fused: nn.Module, shapes: Shapes, everything: bool = False
    ) -> None:
        super().__init__()
        arguments = len(inspect.signature(type(fused).forward).parameters) - 1
        found = list(shapes.values())
        if list(shapes) != [str(number) for number in range(len(found))] or any(
            other != found[0] for other in found
        ):
            raise CheckpointError(
                f"{name}: the files do not hold all experts in one form, numbered from 0; fetch "
                "the model again"
            )
        names = next((n for n in EXPERT if set(n) == set(found[0])), None)
        odd = [key for key in ("has_bias", "has_post_expert_norm") if getattr(fused, key, False)]
        if names is None or arguments not in (1, 3) or odd:
            what = ", ".join(odd) or f"layers {', '.join(found[0])}, {arguments} inputs"
            raise CheckpointError(
                f"{name}: how transformers' {type(fused).__name__} computes is not known ({what}): "
                "it cannot be calibrated or run yet; schemes and options that need no data can be "
                "used"
            )
        self._names, self.everything = names, everything
        # tokens come in as many equal parts as there are experts, zeros where not meant for one
        self._sorted = arguments == 1
        if everything and self._sorted:
            raise CheckpointError(
                f"{name}: {type(fused).__name__} is given an expert's own tokens only: leave out "
                "--all-experts"
            )
        for parameter in list(fused._parameters):
            del fused._parameters[parameter]
        self._fused: Any
        # for its activation; not a submodule, for it has no weights any more
        object.__setattr__(self, "_fused", fused)
        for number, layers in shapes.items():
            expert = nn.ModuleDict()
            for leaf, (rows, width) in layers.items():
                expert[leaf] = nn.Linear(width, rows, bias=False, device="meta")
            self.add_module(number, expert)

    def forward(
        self, hidden: Tensor, index: Tensor | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """(tokens, channels) of the experts' outputs, summed for each token.

        Args:
            index: (tokens, k) the experts of each token.
            weights: (tokens, k) what their outputs are multiplied by.
        """
        if index is None or weights is None:
            return self._parts(hidden)
        found = torch.zeros_like(hidden)
        for number, expert in self.named_children():
            token, place = torch.where(index == int(number))
            output = (
                self._expert(expert, hidden)[token]
                if self.everything
                else self._expert(expert, hidden[token])
            )
            found.index_add_(0, token, (output * weights[token, place, None]).to(found.dtype))
        return found

    def _parts(self, hidden: Tensor) -> Tensor:
        parts = hidden.view(len(self._modules), -1, hidden.shape[-1])
        found = torch.zeros_like(parts)
        for output, part, (_, expert) in zip(found, parts, self.named_children(), strict=True):
            meant = part.any(1)
            output[meant] = self._expert(expert, part[meant])
        return found.view_as(hidden)

    def _expert(self, expert: Any, tokens: Tensor) -> Tensor:
        *ups, down = self._names
        outputs = [expert[name](tokens) for name in ups]
        if len(outputs) == 1:
            return expert[down](self._fused.act_fn(outputs[0]))  # type: ignore[no-any-return]
        if hasattr(self._fused, "_apply_gate"):
            return expert[down](self._fused._apply_gate(torch.cat(outputs, -1)))  # type: ignore[no-any-return]
        gate, up = outputs
        return expert[down](up * self._fused.act_fn(gate))  # type: ignore[no-any-return]


def routed(block: nn.Module, layer: str) -> bool:
    """Whether a layer of a block is given some of the tokens, which may be others in another copy
    of the block.
    """
    parents = layer.rsplit(".", 2)
    owner = block.get_submodule(parents[0]) if len(parents) == 3 else None
    return isinstance(owner, Experts) and not owner.everything
