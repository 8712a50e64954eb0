"""What `kv-fp8` stores and rounds, against compressed-tensors and the nearest number found by
trying all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given, settings, strategies as st

from bitpress.schemes import attention_cache
from bitpress.schemes.attention_cache import STATES, CacheShape
from bitpress.schemes.hardware import find_device
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import StoredLayer

SHAPE = CacheShape(num_query_heads=6, num_heads=2, channels=16)
# every finite E4M3 number
NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
NUMBERS = NUMBERS[NUMBERS.isfinite()]


def make_step(**options: Any) -> Step:
    return discover().get("kv-fp8").step(options)


def draw_states(seed: int = 0, size: float = 1.0, tokens: int = 5) -> dict[str, torch.Tensor]:
    """(sequences, heads, tokens, channels) each; heads differ in size."""
    generator = torch.Generator().manual_seed(seed)
    heads = {"query": SHAPE.num_query_heads, "key": SHAPE.num_heads, "value": SHAPE.num_heads}
    return {
        name: torch.randn(2, heads[name], tokens, SHAPE.channels, generator=generator)
        * (size * torch.arange(1.0, heads[name] + 1).view(1, -1, 1, 1))
        for name in STATES
    }


def store(
    states: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16, **options: Any
) -> StoredLayer:
    step = make_step(**options)
    stats = {name: attention_cache.observe(step, x) for name, x in states.items()}
    return attention_cache.serialize(step, stats, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_there_is_a_scale_for_each_head_or_for_all(strategy: str, dtype: torch.dtype) -> None:
    states = draw_states()
    stored = store(states, dtype, strategy=strategy)
    for name, suffix in (("query", "q_scale"), ("key", "k_scale"), ("value", "v_scale")):
        heads = states[name].shape[1]
        assert stored.tensors[suffix].dtype == dtype
        assert stored.tensors[suffix].shape == ((heads, 1, 1) if strategy == "attn_head" else (1,))


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_no_clip_would_cost_much_less(strategy: str, outlier: float) -> None:
    states = draw_states(tokens=500)
    states["key"][0, 1, 0, 0] *= outlier
    stored = store(states, torch.float32, strategy=strategy)
    step = make_step(strategy=strategy)

    def squared_error(scale: torch.Tensor) -> torch.Tensor:
        tensors = {**stored.tensors, "k_scale": scale}
        key, _ = attention_cache.cache_quantizer(step, tensors, stored.config)(*states.values())
        error = (key - states["key"]).double().square()
        return error.sum((0, 2, 3)) if strategy == "attn_head" else error.sum().view(1)

    magnitude = states["key"].abs()
    heads = magnitude.amax((0, 2, 3)) if strategy == "attn_head" else magnitude.amax().view(1)
    amax = heads.view(-1, 1, 1) if strategy == "attn_head" else heads
    tried = torch.stack([squared_error(amax * x / 448) for x in torch.logspace(-2, 0, 400)])
    # clips are tried in eighths of an octave, where steps of E4M3 are one to two of these
    assert (squared_error(stored.tensors["k_scale"]) <= 1.25 * tried.amin(0)).all()


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_compressed_tensors_reads_the_config_and_rounds_alike(strategy: str) -> None:
    states = draw_states()
    stored = store(states, torch.float32, strategy=strategy)
    arguments = QuantizationArgs(**stored.config)
    step = make_step(strategy=strategy)
    quantize = attention_cache.cache_quantizer(step, stored.tensors, stored.config)
    rounded = quantize(*states.values())
    for name, suffix, own in zip(("key", "value"), ("k_scale", "v_scale"), rounded, strict=True):
        scale = stored.tensors[suffix]
        expected = fake_quantize(states[name], scale, torch.zeros_like(scale), arguments)
        assert torch.equal(own, expected)


@given(seed=st.integers(0, 100), exponent=st.integers(-30, 30))
@settings(deadline=None, max_examples=40)
def test_keys_become_the_nearest_number_that_the_cache_can_hold(seed: int, exponent: int) -> None:
    states = draw_states(seed, 2.0**exponent)
    stored = store(states)
    quantize = attention_cache.cache_quantizer(make_step(), stored.tensors, stored.config)
    key, _ = quantize(*(3 * x for x in states.values()))
    scale = stored.tensors["k_scale"].float()
    kept, asked = (key / scale).flatten(), (3 * states["key"] / scale).flatten()
    nearest = (asked.unsqueeze(1) - NUMBERS).abs().amin(1)
    assert torch.isin(kept, NUMBERS).all()
    assert torch.equal((asked - kept).abs(), nearest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e4, 1e37])
def test_scales_are_positive_and_finite_whatever_is_seen(size: float, dtype: torch.dtype) -> None:
    stored = store(draw_states(size=size), dtype)
    for scale in stored.tensors.values():
        assert (scale > 0).all()
        # the largest number that is read back
        assert (448 * scale).isfinite().all()


@pytest.mark.parametrize(
    ("device", "strategy", "level"),
    [
        ("T4", "tensor", "unsupported"),
        ("A100", "tensor", "recommended"),
        ("H100", "tensor", "recommended"),
        ("H100", "attn_head", "recommended"),
        ("A100", "attn_head", "unsupported"),
        ("RTX 5090", "attn_head", "unsupported"),
        ("MI300X", "tensor", "unsupported"),
        ("MI355X", "tensor", "supported"),
        ("CPU x86", "tensor", "supported"),
        ("CPU x86", "attn_head", "unsupported"),
        ("Google TPU", "tensor", "unsupported"),
    ],
)
def test_devices_are_judged_by_the_engine_s_attention(
    device: str, strategy: str, level: str
) -> None:
    findings = make_step(strategy=strategy).call("validate_hardware", hardware=find_device(device))
    assert findings[0].level == level
