"""What each candidate for each unit does to a model's predictions, measured in one pass through its blocks.

The model goes through its blocks as it is. At each block every unit is replaced for a moment by what a candidate makes of it; the
hidden states of a few sequences that come out of the block then go through the rest of the model beside the model's own. At
its end stands what that one replacement costs. Errors of different layers have little to do with one another, so that what
several cost together is about the sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from bitpress import chain, stacks
from bitpress.calibrate import memory
from bitpress.calibrate.decoder import Decoder
from bitpress.calibrate.recorder import head, record
from bitpress.calibrate.states import States
from bitpress.calibrate.tokens import FEW
from bitpress.checkpoint.reader import Reader
from bitpress.layer import Layer, Stat
from bitpress.planning import Plan
from bitpress.progress import Told
from bitpress.rounding import Rounding, hook, input_rounding
from bitpress.search.units import Unit
from bitpress.shards import Stack

LOGITS = 1 << 22  # numbers that are made at a time


@frozen(eq=False)
class _Served:
    """A layer as it would be served: its weight, and what is made of its inputs."""

    weight: Tensor
    rounding: Rounding | None


def measure(
    plan: Plan, units: Sequence[Unit], fitted: Tensor, judged: Tensor, device: torch.device, place: Path | None, trust: bool,
    told: Told,
) -> list[list[float]]:  # fmt: skip
    """KL divergence from the model as it is, in nats per token, for each unit and each of its candidates.

    Args:
        plan: of any candidate.
        fitted: (sequences, length) token ids that candidates are fitted to.
        judged: (sequences, length) others, on which predictions are compared.
        place: a folder in which hidden states are kept; None keeps them in memory.
        told: is told the bytes of every unit.
    """
    batches = [*torch.split(fitted, max(memory.BATCH // fitted.shape[1], 1)), judged]
    with Reader() as reader, torch.no_grad():
        decoder = Decoder(plan.source, plan.container, reader, device, torch.float32, trust)
        recording = record(decoder, batches, device, torch.float32, place)
        states, changed = recording.hidden, States(folder=place)
        for index in range(len(decoder)):
            prefix, calls = f"{plan.container}.{index}.", recording.calls[index]
            block, beside = decoder.block(index), None
            for i in range(len(changed)):
                changed[i] = calls[-1](block, changed[i].to(device))
            own = [unit for unit in units if unit.block(plan.container) == index]
            observed = [_observed(unit, block, prefix) for unit in own]
            handles = [
                block.get_submodule(next(iter(one.forms[0].members)).removeprefix(prefix)).register_forward_pre_hook(one)
                for unit in observed
                for one in unit
            ]
            for i in range(len(batches) - 1):
                states[i] = calls[i](block, states[i].to(device))
            for handle in handles:
                handle.remove()
            before = states[len(batches) - 1].to(device)
            for unit, parts in zip(own, observed, strict=True):
                for candidate in range(len(unit.choices)):
                    served = {name: layer for part in parts for name, layer in part.served(candidate).items()}
                    with _replaced(block, prefix, served):
                        changed.append(calls[-1](block, before))
                told(sum(stack.reads for stack in unit.choices[0]), unit.name)
            output = calls[-1].whole(block, before)
            beside = tuple(output[1:]) if isinstance(output, tuple) else None
            states[len(batches) - 1] = output[0] if isinstance(output, tuple) else output
            recording.calls[index] = []
            memory.give_back()
        found_all = _compare(decoder, beside, states[len(batches) - 1], changed, device)
    taken = iter(found_all)
    return [[next(taken) for _ in unit.choices] for unit in units]


class _Observed:
    """What candidates are told of the inputs of one stack.

    Args:
        forms: the stack as each candidate has it.
        weight: (out, in) float32.
    """

    def __init__(self, forms: Sequence[Stack], weight: Tensor) -> None:
        self.forms, self.weight, self.tokens = forms, weight, 0
        self._stats: list[list[dict[str, Stat]]] = [[{} for _ in stack.steps] for stack in forms]

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Take up a batch, as a hook of the stack's first layer."""
        inputs = arguments[0].flatten(0, -2)
        self.tokens += len(inputs)
        for stack, stats in zip(self.forms, self._stats, strict=True):
            for step, own in zip(stack.steps, stats, strict=True):
                if step.calibrated and len(inputs):
                    chain.merge(own, chain.observe(step, self.weight, inputs))

    def served(self, candidate: int) -> dict[str, _Served]:
        """What a candidate makes of the stack, by layer, as a loader would compute with it."""
        stack, stats = self.forms[candidate], self._stats[candidate]
        if stacks.experts(stack.members) and self.tokens < FEW:
            stats = [{} for _ in stack.steps]
        whole = chain.quantize_whole(Layer(stack.name, self.weight, stack.dtype), stack.steps, stats)
        members = chain.split(whole, [entry.shape[0] for entry in stack.members.values()])
        found = {}
        for (name, entry), member in zip(stack.members.items(), members, strict=True):
            stored = chain.record(chain.pack(member, stack.steps), stack.steps)
            weight = chain.restore(stored.tensors, stored.config, stack.steps, entry.shape)
            found[name] = _Served(weight, input_rounding(stored.tensors, stored.config, stack.steps))
        return found


def _observed(unit: Unit, block: nn.Module, prefix: str) -> list[_Observed]:
    """One for each stack of a unit."""
    found = []
    for forms in zip(*unit.choices, strict=True):
        names = [name.removeprefix(prefix) for name in forms[0].members]
        found.append(_Observed(forms, torch.cat([block.get_parameter(f"{name}.weight") for name in names])))
    return found


@contextlib.contextmanager
def _replaced(block: nn.Module, prefix: str, layers: Mapping[str, _Served]) -> Iterator[None]:
    """For a while some layers of a block compute as they would be served."""
    kept, handles = [], []
    for name, served in layers.items():
        module = block.get_submodule(name.removeprefix(prefix))
        weight = module.get_parameter("weight")
        kept.append((weight, weight.data))
        weight.data = served.weight.to(weight.dtype)
        if served.rounding is not None:
            handles.append(module.register_forward_pre_hook(hook(served.rounding)))
    try:
        yield
    finally:
        for weight, data in kept:
            weight.data = data
        for handle in handles:
            handle.remove()


def _compare(
    decoder: Decoder, beside: tuple[Any, ...] | None, plain: Tensor, changed: States, device: torch.device
) -> list[float]:
    """Σ p (log p - log q) per token, p being what the model expects and q what it does with each changed state."""
    sums = [0.0] * len(changed)
    plain = plain.flatten(0, -2)
    with head(decoder, beside) as logits:
        step = max(LOGITS // logits(plain[:1].to(device)).shape[1], 1)
        for first in range(0, len(plain), step):
            tokens = slice(first, first + step)
            p = logits(plain[tokens].to(device)).float().log_softmax(-1)
            for i in range(len(changed)):
                q = logits(changed[i].flatten(0, -2)[tokens].to(device)).float().log_softmax(-1)
                sums[i] += float(nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(dtype=torch.float64))
    return [total / len(plain) for total in sums]
