"""Experts, which transformers keeps in one tensor, as linear layers of their own: each is given the
tokens that are routed to it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress.checkpoint.layer_names import EXPERT
from bitpress.errors import CheckpointError
from bitpress.numerics.gram import multiply_tokens

# By expert and name of its layer, the weight's (out, in).
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]

# The numbers, ascending, of the tokens that the layers which the current forward pass is at are
# given of its batch; None: they are given all.
ROUTED_TOKENS: ContextVar[Tensor | None] = ContextVar("ROUTED_TOKENS", default=None)


class _Linear(nn.Linear):
    """A layer of an expert, which is given another number of tokens each time."""

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, in) -> (tokens, out)."""
        return multiply_tokens(x, self.weight)


class Experts(nn.Module):
    """In place of a module that computes a block's experts from fused weights:
    `experts.0.gate_proj` is a layer of the first.

    Every layer is called in every forward, maybe with no token at all, so that a forward passes all
    of them.

    Args:
        name: of the module, for messages.
        fused: what it stands for.
        shapes: of the layers as the files have them.
        all_experts: whether each expert computes every token; the output is the same.

    Attributes:
        num_together: experts that compute side by side: the inputs of a layer of all of these are
            there before it computes in one of them.
        arrival_hooks: by layer, `0.gate_proj`, what is called with its inputs (tokens, in) when
            those of all experts beside it are there.

    Raises:
        CheckpointError: it computes in a way that is not known here, or experts are missing.
    """

    def __init__(
        self, name: str, fused: nn.Module, shapes: Shapes, all_experts: bool = False
    ) -> None:
        super().__init__()
        # beside self
        num_inputs = len(inspect.signature(type(fused).forward).parameters) - 1
        self._layers, self.all_experts = _layer_names(name, fused, shapes, num_inputs), all_experts
        self.num_together = 1
        self.arrival_hooks: dict[str, Callable[[Tensor], None]] = {}
        # Llama 4 gives its experts their tokens in as many equal parts as there are experts, zeros
        # where a token is not routed to one; other models give tokens, experts and weights
        self._has_parts = num_inputs == 1
        if all_experts and self._has_parts:
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
            for leaf, (num_rows, num_columns) in layers.items():
                expert[leaf] = _Linear(num_columns, num_rows, bias=False, device="meta")
            self.add_module(number, expert)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """(tokens, channels) of the experts' outputs, summed for each token.

        Args:
            hidden_states: (tokens, channels).
            top_k_index: the experts of each token, (tokens, k).
            top_k_weights: what their outputs are multiplied by, (tokens, k).
        """
        if top_k_index is None or top_k_weights is None:
            return self._compute_parts(hidden_states)
        summed = torch.zeros_like(hidden_states)
        by_expert = _sort_by_expert(top_k_index.flatten(), len(self._modules))
        num_chosen = top_k_index.shape[1]
        tokens = [chosen // num_chosen for chosen in by_expert]
        if self.all_experts:
            outputs = self._compute((hidden_states, None) for _ in tokens)
        else:
            outputs = self._compute((hidden_states[token], token) for token in tokens)
        for output, chosen, token in zip(outputs, by_expert, tokens, strict=True):
            own = output[token] if self.all_experts else output
            weighted = own * top_k_weights[token, chosen % num_chosen, None]
            summed.index_add_(0, token, weighted.to(summed.dtype))
        return summed

    def _compute_parts(self, hidden_states: Tensor) -> Tensor:
        parts = hidden_states.view(len(self._modules), -1, hidden_states.shape[-1])
        outputs = torch.zeros_like(parts)
        is_routed = parts.any(2)  # (experts, tokens)
        tokens = torch.split(is_routed.nonzero()[:, 1], is_routed.sum(1).tolist())
        inputs = zip(parts, tokens, strict=True)
        routed = self._compute((part[token], token) for part, token in inputs)
        for output, own, token in zip(outputs, routed, tokens, strict=True):
            output[token] = own
        return outputs.view_as(hidden_states)

    def _compute(self, inputs: Iterable[tuple[Tensor, Tensor | None]]) -> Iterator[Tensor]:
        """The outputs (tokens, channels) of all experts, one after the other.

        Args:
            inputs: of each (tokens, channels), and the numbers of these tokens; None: they are all.
        """
        *ups, down = self._layers
        of_experts = zip(self._modules, inputs, strict=True)
        while together := list(itertools.islice(of_experts, self.num_together)):
            experts = [number for number, _ in together]
            routed = [token for _, (_, token) in together]
            x = [x for _, (x, _) in together]
            # nothing is held longer than a layer needs it
            del together
            outputs = [self._call(leaf, experts, x, routed) for leaf in ups]
            x = list(map(self._activate, *outputs))
            del outputs
            yield from self._call(down, experts, x, routed)

    def _call(
        self,
        leaf: str,
        experts: Sequence[str],
        inputs: Sequence[Tensor],
        tokens: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """What a layer makes of its inputs in each of some experts."""
        for expert, x, token in zip(experts, inputs, tokens, strict=True):
            hook = self.arrival_hooks.get(f"{expert}.{leaf}")
            if hook is not None:
                outside = ROUTED_TOKENS.set(token)
                try:
                    hook(x)
                finally:
                    ROUTED_TOKENS.reset(outside)
        modules: Any = self._modules
        return [modules[expert][leaf](x) for expert, x in zip(experts, inputs, strict=True)]

    def _activate(self, *outputs: Tensor) -> Tensor:
        if len(outputs) == 1:
            return self._fused.act_fn(outputs[0])  # type: ignore[no-any-return]
        if hasattr(self._fused, "_apply_gate"):
            return self._fused._apply_gate(torch.cat(outputs, -1))  # type: ignore[no-any-return]
        gate, up = outputs
        return up * self._fused.act_fn(gate)  # type: ignore[no-any-return]


def _sort_by_expert(experts: Tensor, num_experts: int) -> list[Tensor]:
    """For each expert, ascending, the places that have its number among those in (places,)."""
    # the host waits for the GPU here, once for all experts
    counts = experts.bincount(minlength=num_experts).tolist()
    return list(torch.split(experts.argsort(stable=True), counts))[:num_experts]


def _layer_names(name: str, fused: nn.Module, shapes: Shapes, num_inputs: int) -> tuple[str, ...]:
    """The layers of an expert in the order in which they compute; raises CheckpointError where how
    they do is not known.
    """
    experts = list(shapes.values())
    is_complete = list(shapes) == [str(number) for number in range(len(experts))]
    if not is_complete or any(expert != experts[0] for expert in experts):
        raise CheckpointError(
            f"{name}: the files do not hold all experts in one form, numbered from 0; fetch the "
            "model again"
        )
    layers = next((layers for layers in EXPERT if set(layers) == set(experts[0])), None)
    unknown = [key for key in ("has_bias", "has_post_expert_norm") if getattr(fused, key, False)]
    if layers is None or num_inputs not in (1, 3) or unknown:
        fact = ", ".join(unknown) or f"layers {', '.join(experts[0])}, {num_inputs} inputs"
        raise CheckpointError(
            f"{name}: how transformers' {type(fused).__name__} computes is not known ({fact}): it "
            "cannot be calibrated or run yet; schemes and options that need no data can be used"
        )
    return tuple(layers)


@frozen(eq=False)
class ExpertLayer:
    """A layer of one of a block's experts.

    Attributes:
        experts: the module that computes them.
        name: of the layer within it, `0.gate_proj`.
    """

    experts: Experts
    name: str

    @property
    def neighbors(self) -> tuple[int, int, str]:
        """The same for layers of the experts that compute side by side."""
        number, leaf = self.name.split(".")
        return id(self.experts), int(number) // self.experts.num_together, leaf


def find_expert_layer(block: nn.Module, layer: str) -> ExpertLayer | None:
    """A layer of a block as one of an expert's; None where it is none."""
    parents = layer.rsplit(".", 2)
    owner = block.get_submodule(parents[0]) if len(parents) == 3 else None
    return ExpertLayer(owner, ".".join(parents[1:])) if isinstance(owner, Experts) else None


def is_routed(block: nn.Module, layer: str) -> bool:
    """Whether a layer of a block is given some of the tokens, which may be others in another copy
    of the block.
    """
    expert_layer = find_expert_layer(block, layer)
    return expert_layer is not None and not expert_layer.experts.all_experts


def compute_together(block: nn.Module, num_together: int) -> None:
    """Let so many experts of a block compute side by side; where each computes every token, one."""
    for module in block.modules():
        if isinstance(module, Experts):
            module.num_together = 1 if module.all_experts else num_together
