"""Products over tokens, of float32 and of int8, against float64."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from fixtures.fake_gpu import GPU, Pretended, bare
from torch.nn import functional

from bitpress.numerics.gptq import gptq_statistics
from bitpress.numerics.gram import (
    TOKEN_MULTIPLE,
    TOKENS_PER_SCALE,
    TallMatrix,
    cross,
    gram,
    multiply_tokens,
    product_dtype,
    stripes,
)
from bitpress.numerics.output_hessian import output_statistics


def inputs(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """(tokens, in) float32, channels of unlike size."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, width, generator=generator)
        * (torch.randn(width, generator=generator) * 3).exp()
    )


def relative_error(product: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The error of a product, in units of its channels' norms."""
    a, b = left.double(), right.double()
    return (product.double() - a.T @ b).abs() / a.norm(dim=0).unsqueeze(1) / b.norm(dim=0)


@pytest.fixture(params=[False, True], ids=["float32", "int8"])
def uses_int8(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products are taken of int8, whatever this CPU would choose."""
    monkeypatch.setattr("bitpress.numerics.gram._uses_int8", lambda x: request.param)
    return bool(request.param)


@pytest.mark.parametrize(
    ("tokens", "width"), [(1, 1), (7, 300), (100, 700), (TOKENS_PER_SCALE + 33, 40), (300, 2100)]
)
def test_a_gram_matrix_is_the_whole_product_and_symmetric(
    uses_int8: bool, tokens: int, width: int
) -> None:
    x = inputs(tokens, width)
    product = gram(x)
    assert torch.equal(product, product.T)
    assert relative_error(product, x, x).max() < (1.5e-2 if uses_int8 else 1e-5)
    if uses_int8 and tokens > 1000:
        assert relative_error(product, x, x).max() < 1e-3


@pytest.mark.parametrize(
    ("tokens", "left", "right"), [(1, 3, 2), (300, 5, 70), (TOKENS_PER_SCALE + 1, 33, 8)]
)
def test_a_cross_product_is_that_of_two_kinds_of_channels(
    uses_int8: bool, tokens: int, left: int, right: int
) -> None:
    a, b = inputs(tokens, left), inputs(tokens, right, 1)
    assert relative_error(cross(a, b), a, b).max() < (1.5e-2 if uses_int8 else 1e-5)


def test_products_of_what_was_made_ready_once_are_the_same_to_the_bit(uses_int8: bool) -> None:
    a, b = inputs(TOKENS_PER_SCALE + 300, 33), inputs(TOKENS_PER_SCALE + 300, 8, 1)
    tall = TallMatrix.of(b)
    assert torch.equal(cross(a, tall), cross(a, b))
    assert torch.equal(cross(tall, a), cross(b, a))
    assert torch.equal(gram(tall), gram(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_multiplies_16_bits_as_the_same_numbers_in_32(
    uses_int8: bool, dtype: torch.dtype
) -> None:
    # so small that float16 has them
    x, y = (inputs(300, 70) / 256).to(dtype), inputs(300, 40, 1).to(dtype)
    x[:, 1] = 0
    assert torch.equal(gram(x), gram(x.float()))
    assert torch.equal(cross(x, y), cross(x.float(), y.float()))


def test_codes_are_multiplied_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitpress.numerics.gram._uses_int8", lambda x: True)
    x = torch.randint(-127, 128, (500, 64), generator=torch.Generator().manual_seed(0)).float()
    # so that every scale is 1
    x[0] = 127
    assert torch.equal(gram(x).double(), x.double().T @ x.double())
    y = x[:, :7].clone()
    assert torch.equal(cross(x, y).double(), x.double().T @ y.double())


def test_one_token_that_holds_all_of_a_channel_adds_no_more_than_is_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bitpress.numerics.gram._uses_int8", lambda x: True)
    x = inputs(TOKENS_PER_SCALE, 8)
    x[5] = 1e4 * x.abs().amax()
    exact = x.double().square().sum(0)
    assert ((gram(x).diagonal() - exact).abs() <= TOKENS_PER_SCALE / (12 * 127**2) * exact).all()


@pytest.mark.parametrize("uses_int8", [False, True], indirect=True)
def test_silent_channels_and_tiny_numbers_give_finite_sums(uses_int8: bool) -> None:
    x = inputs(300, 4)
    x[:, 1] = 0
    x[:, 2] = 1e-45
    product = gram(x)
    assert product.isfinite().all()
    assert not product[1].any()


@pytest.mark.parametrize("width", [1, 255, 256, 1000, 4096])
def test_stripes_cover_all_columns_once(width: int) -> None:
    assert [c for stripe in stripes(width) for c in range(width)[stripe]] == list(range(width))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_multiplies_16_bits_as_they_are_and_adds_up_in_float32(dtype: torch.dtype) -> None:
    # so small that float16 has them
    x, y = (inputs(300, 700) / 256).to(dtype), inputs(300, 40, 1).to(dtype)
    with Pretended():
        on_gpu = x.to(GPU)
        assert product_dtype(on_gpu) == dtype
        square, product = gram(on_gpu), cross(on_gpu, y.to(GPU))
    assert square.device == product.device == GPU
    assert torch.equal(bare(square), bare(square).T)
    assert relative_error(bare(square), x, x).max() < 1e-5
    assert relative_error(bare(product), x, y).max() < 1e-5


@pytest.mark.parametrize("rows", [24, 16], ids=["more outputs", "few outputs"])
def test_what_a_gpu_observes_of_bfloat16_is_what_float64_would(rows: int) -> None:
    x = inputs(300, 40).bfloat16()
    source = (x + 0.05 * inputs(300, 1, 1).tanh() * x).bfloat16()
    residual, gradient = inputs(300, rows, 2).bfloat16(), inputs(300, rows, 3).bfloat16()
    # as a model of bfloat16 has it
    weight = inputs(rows, 40, 4).bfloat16().float()
    with Pretended():
        batch = (tensor.to(GPU) for tensor in (x, weight, source, residual))
        stats = gptq_statistics(*batch) | output_statistics(gradient.to(GPU))
    value = {name: bare(stat.value) for name, stat in stats.items()}
    drift = source.double() - x.double()
    assert relative_error(value["hessian"], x, x).max() < 1e-5
    assert relative_error(value["output_hessian"][:, :rows], gradient, gradient).max() < 1e-5
    missing = drift @ weight.double().T + residual.double()
    # where numbers are far apart, their difference is rounded to bfloat16
    if rows == 24:
        assert relative_error(value["drift"], drift, x).max() < 2**-9
        assert relative_error(value["residual"], residual, x).max() < 1e-5
        missing = missing[::8]
    else:
        assert relative_error(value["cross_moment"], missing, x).max() < 2**-9
    squares = missing.square().sum(0)
    assert value["missing"].double() == pytest.approx(squares, rel=2**-8)


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_multiplied_in_few_numbers_and_each_becomes_what_it_is(
    num_tokens: int, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(num_tokens)
    x, weight = (torch.randn(rows, 48, generator=draw).to(dtype) for rows in (num_tokens, 24))
    with patch("bitpress.numerics.gram.linear", wraps=functional.linear) as linear:
        product = multiply_tokens(x, weight)
    assert len(linear.call_args.args[0]) % TOKEN_MULTIPLE == 0
    error = product.double() - x.double() @ weight.double().T
    magnitude = x.abs().double() @ weight.abs().double().T
    # of float32 sums, and of their rounding
    bound = 48 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert (error.abs() <= bound * magnitude).all()
