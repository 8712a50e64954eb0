"""Layers whose weights lie in the host's memory compute what layers on the device compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bitpress.modeling.host_weights import BroughtWeights, computed_weight, lies_on_host

CPU = torch.device("cpu")
LAYER_BYTES = 4 * 16 * 16


class Copies(BroughtWeights):
    """The host is its own device: a copy is told from the weight by its address."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(CPU, max_bytes)
        self.brought: list[Tensor] = []

    def copy(self, weight: Tensor) -> Tensor:
        self.brought.append(weight)
        return weight.clone()


def make_block(num_layers: int, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16, bias=bias) for _ in range(num_layers)]
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_the_same_to_the_bit(bias: bool) -> None:
    block = make_block(3, bias)
    brought = copy.deepcopy(block)
    Copies(LAYER_BYTES).take(brought)
    results = []
    for module in (block, brought):
        x = torch.linspace(-1, 1, 2 * 5 * 16).view(2, 5, 16).requires_grad_()
        output = module(x)
        results.append((output.detach(), *torch.autograd.grad(output.square().sum(), x)))
    for whole, by_layer in zip(*results, strict=True):
        assert torch.equal(whole, by_layer)


def test_a_weight_is_brought_once_for_all_batches_that_come_to_it_in_turn() -> None:
    block, copies = make_block(2), Copies(LAYER_BYTES)
    copies.take(block)
    for layer in block:
        for _ in range(3):
            layer(torch.ones(1, 16))
    assert [id(weight) for weight in copies.brought] == [id(layer.weight) for layer in block]


def test_no_more_copies_are_held_than_allowed_and_the_last_ones_stay() -> None:
    block, copies = make_block(3), Copies(2 * LAYER_BYTES)
    copies.take(block)
    for number in (0, 1, 0, 2, 0, 2, 1):
        block[number](torch.ones(1, 16))
    order = [next(i for i, layer in enumerate(block) if layer.weight is w) for w in copies.brought]
    assert order == [0, 1, 2, 1]


def test_a_weight_that_has_changed_is_brought_anew() -> None:
    block, copies = make_block(1), Copies(LAYER_BYTES)
    copies.take(block)
    before = computed_weight(block[0])
    block[0].weight.mul_(2)
    assert torch.equal(computed_weight(block[0]), 2 * before)


def test_only_weights_of_plain_linear_layers_stay_in_the_host_s_memory() -> None:
    class Router(nn.Linear):
        pass

    block = nn.ModuleList([nn.Linear(4, 4), Router(4, 4), nn.LayerNorm(4)])
    Copies(0).take(block)
    on_host = [
        (number, leaf)
        for number, module in enumerate(block)
        for leaf, _ in module.named_parameters()
        if lies_on_host(module, leaf)
    ]
    assert on_host == [(0, "weight")]
