"""Laws of a scheme for an attention's cache: what it observes, what it stores, and what becomes of
keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import attrs
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from bitpress.planning.attention_caches import tensor_specs
from bitpress.schemes import attention_cache, pipeline
from bitpress.schemes.attention_cache import STATES, CacheShape
from bitpress.schemes.hardware import DEVICES
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Finding, Statistic, StoredLayer

SHAPE = CacheShape(num_query_heads=6, num_heads=2, channels=16)


def draw(seed: int = 0, num_sequences: int = 3) -> dict[str, Tensor]:
    """Queries, keys and values: (sequences, heads, tokens, channels) bfloat16 each."""
    generator = torch.Generator().manual_seed(seed)
    heads = dict.fromkeys(STATES, SHAPE.num_heads) | {"query": SHAPE.num_query_heads}
    return {
        name: torch.randn(num_sequences, heads[name], 7, SHAPE.channels, generator=generator)
        .mul_(torch.arange(1.0, SHAPE.channels + 1))
        .bfloat16()
        for name in STATES
    }


def difficult() -> dict[str, dict[str, Tensor]]:
    """Difficult queries, keys and values, by their property."""
    normal = draw()
    outlier = {name: x.clone() for name, x in normal.items()}
    for x in outlier.values():
        x[0, 0, 0, 0] = 10000
    return {
        "normal": normal,
        "zero": {name: torch.zeros_like(x) for name, x in normal.items()},
        "huge": {name: x * 2.0**100 for name, x in normal.items()},
        "small": {name: x * 2.0**-100 for name, x in normal.items()},
        "one outlier": outlier,
    }


def observe(step: Step, states: Mapping[str, Tensor]) -> dict[str, Mapping[str, Statistic]]:
    """What a scheme observes of some queries, keys and values."""
    return {name: attention_cache.observe(step, x) for name, x in states.items()}


def store(step: Step, states: Mapping[str, Tensor]) -> StoredLayer:
    """What a scheme stores, written to safetensors and JSON and read back."""
    stored = attention_cache.serialize(step, observe(step, states), torch.bfloat16)
    tensors = load(save({name: tensor.contiguous() for name, tensor in stored.tensors.items()}))
    return StoredLayer(tensors, json.loads(json.dumps(stored.config)))


def quantize(step: Step, stored: StoredLayer, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys and values as a loader reads them back."""
    quantizer = attention_cache.cache_quantizer(step, stored.tensors, stored.config)
    return dict(zip(STATES[1:], quantizer(*(states[name] for name in STATES)), strict=True))


def test_a_scheme_says_what_it_is_and_what_may_be_set(step: Step) -> None:
    assert step.scheme.summary, (
        "the plugin needs a docstring: its first line is what `bitpress schemes` shows"
    )
    for field in attrs.fields(step.scheme.options_type):
        assert field.metadata.get("help"), (
            f"the option {field.name!r} needs a line of help: bitpress.option(default, help)"
        )


def test_statistics_of_two_batches_are_those_of_both_together(step: Step) -> None:
    whole, parts = draw(), [draw(), draw(seed=1)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in STATES}
    together = observe(step, whole)
    for name in STATES:
        merged: dict[str, Statistic] = {}
        for part in parts:
            pipeline.merge(merged, observe(step, part)[name])
        for key, statistic in together[name].items():
            torch.testing.assert_close(
                merged[key].value,
                statistic.value,
                rtol=1e-4,
                atol=1e-4,
                msg=f"`observe_cache`: {key!r} must be a sum or a maximum over tokens",
            )


def test_what_is_stored_is_what_was_planned(step: Step) -> None:
    planned = attention_cache.describe(SHAPE, torch.bfloat16, step)
    advice = "`serialize_cache`: names, dtypes, shapes and config must not depend on numbers"
    for states in difficult().values():
        stored = attention_cache.serialize(step, observe(step, states), torch.bfloat16)
        assert tensor_specs(stored) == tensor_specs(planned), advice
        assert stored.config == planned.config, advice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_stored_is_finite(step: Step, dtype: torch.dtype) -> None:
    for name, states in difficult().items():
        if name == "huge" and dtype == torch.float16:
            continue
        stored = attention_cache.serialize(step, observe(step, states), dtype)
        for suffix, tensor in stored.tensors.items():
            assert tensor.float().isfinite().all(), f"{suffix} of {name} states is not finite"


@pytest.mark.parametrize("kind", list(difficult()))
def test_keys_and_values_come_back_near(step: Step, kind: str) -> None:
    states = difficult()[kind]
    rounded = quantize(step, store(step, states), states)
    for name, restored in rounded.items():
        given = states[name]
        assert restored.shape == given.shape
        assert restored.dtype == given.dtype
        assert restored.isfinite().all(), f"`quantize_cache` makes NaN or infinity of {kind} {name}"
        error = (restored.double() - given.double()).norm()
        assert error <= 0.5 * given.double().norm(), (
            f"`quantize_cache` leaves less than half of {kind} {name}"
        )


def test_what_was_rounded_stays_as_it_is(step: Step) -> None:
    states = {name: x.float() for name, x in draw().items()}
    stored = store(step, states)
    once = quantize(step, stored, states)
    twice = quantize(step, stored, {**states, **once})
    for name in once:
        assert torch.equal(once[name], twice[name]), f"`quantize_cache` moves rounded {name}"


def test_a_token_is_rounded_by_itself(step: Step) -> None:
    states = draw()
    stored = store(step, states)
    whole = quantize(step, stored, states)
    part = quantize(step, stored, {name: x[1:, :, 3:] for name, x in states.items()})
    for name in whole:
        assert torch.equal(whole[name][1:, :, 3:], part[name]), (
            f"`quantize_cache` must not look at other tokens: it did for {name}"
        )


def test_hooks_leave_what_they_are_given_as_it_was(step: Step) -> None:
    stored = store(step, draw())
    tensors = {suffix: tensor.clone() for suffix, tensor in stored.tensors.items()}
    for name in STATES[1:]:
        states = draw()[name].float().transpose(1, 2).flatten(0, 1)  # (tokens, heads, channels)
        before = states.clone()
        step.call("observe_cache", states=states)
        assert torch.equal(states, before), f"`observe_cache` has changed the {name} it got"
        step.scheme.call(
            "quantize_cache", states=states, name=name, tensors=tensors, config=stored.config
        )
        assert torch.equal(states, before), f"`quantize_cache` has changed the {name} it got"
    for suffix, tensor in stored.tensors.items():
        assert torch.equal(tensors[suffix], tensor), f"`quantize_cache` has changed {suffix}"


def test_every_device_gets_a_finding(step: Step) -> None:
    for device in DEVICES:
        findings = step.call("validate_hardware", hardware=device)
        assert findings, f"`validate_hardware` must say something about {device.name}"
        assert all(isinstance(finding, Finding) for finding in findings)
