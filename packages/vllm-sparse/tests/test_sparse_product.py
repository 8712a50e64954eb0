"""Products with packed weights are those with dense ones."""

from __future__ import annotations

import pytest
import torch

from bitpress_vllm_sparse import sparse_product, windows

# (out, in) of layers of an 8B model, an eighth as high and wide where a CPU computes.
SHAPES = [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)]
TOKENS = [1, 7, 16, 33, 256, 4096]

# What numbers are multiplied, and in which dtype products come back.
KINDS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.int8, torch.bfloat16),
    (torch.int8, torch.int32),
    (torch.float8_e4m3fn, torch.bfloat16),
    (torch.float8_e4m3fn, torch.float32),
]


def make_numbers(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Whole numbers from -3 to 3, of which every dtype holds sums of a few exactly."""
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randint(-3, 4, shape, generator=generator).to(device, dtype)


def prune(weight: torch.Tensor, num_kept: int, group_size: int) -> torch.Tensor:
    """Zeros for all but `num_kept` of every `group_size` neighbors."""
    generator = torch.Generator().manual_seed(1)
    groups = (len(weight), weight.shape[1] // group_size, group_size)
    order = torch.rand(groups, generator=generator).argsort(2).flatten(1).to(weight.device)
    return (weight.float() * (order < num_kept)).to(weight.dtype)


@pytest.mark.parametrize(("dtype", "out_dtype"), KINDS, ids=str)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_two_of_four(
    device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype, num_tokens: int
) -> None:
    # rows and tokens that are no multiples of what a kernel takes
    weight = prune(make_numbers((70, 64), dtype, device), 2, 4)
    inputs = make_numbers((num_tokens, 64), dtype, device)
    algorithms = sparse_product.choose_algorithms(weight, out_dtype)
    packed = sparse_product.pack(weight)
    result = sparse_product.linear(inputs, packed, 70, out_dtype, algorithms)
    assert (result.dtype, result.shape) == (out_dtype, (num_tokens, 70))
    expected = inputs.double() @ weight.double().T
    assert torch.equal(result, expected.to(out_dtype))


@pytest.mark.parametrize(("dtype", "out_dtype"), KINDS, ids=str)
@pytest.mark.parametrize("num_kept", [4, 6])
def test_more_of_eight_in_windows(
    device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype, num_kept: int
) -> None:
    # an odd number of 32 columns
    weight = prune(make_numbers((64, 64), dtype, device), num_kept, 8)
    inputs = make_numbers((9, 64), dtype, device)
    spread = windows.spread(weight, weight.float() != 0)
    algorithms = sparse_product.choose_algorithms(spread, out_dtype)
    columns = windows.window_columns(64, device)
    result = sparse_product.linear(
        windows.repeat_inputs(inputs, columns),
        sparse_product.pack(spread),
        64,
        out_dtype,
        algorithms,
    )
    assert torch.equal(result, (inputs.double() @ weight.double().T).to(out_dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 4096])
def test_layers_of_an_8b_model_in_fp8(
    device: torch.device, shape: tuple[int, int], num_tokens: int
) -> None:
    if device.type == "cpu":
        shape, num_tokens = (shape[0] // 8, shape[1] // 8), min(num_tokens, 64)
    dtype = torch.float8_e4m3fn
    weight = prune(make_numbers(shape, dtype, device), 2, 4)
    inputs = make_numbers((num_tokens, shape[1]), dtype, device)
    algorithms = sparse_product.choose_algorithms(weight, torch.float32)
    packed = sparse_product.pack(weight)
    # numbers, and two bits for each that is kept
    assert packed.nbytes == weight.nbytes * 10 // 16
    result = sparse_product.linear(inputs, packed, shape[0], torch.float32, algorithms)
    assert torch.equal(result.double(), inputs.double() @ weight.double().T)


def test_a_packed_weight_has_whole_rows_and_columns_of_a_kernel() -> None:
    assert sparse_product.fits(64, torch.int8)
    assert not sparse_product.fits(48, torch.int8)
    assert sparse_product.fits(48, torch.bfloat16)


def test_a_compiler_knows_the_shape_of_a_product(device: torch.device) -> None:
    weight = prune(make_numbers((64, 64), torch.bfloat16, device), 2, 4)
    inputs = make_numbers((5, 64), torch.bfloat16, device)
    packed = sparse_product.pack(weight)
    arguments = (inputs, packed, 64, torch.bfloat16, [0] * len(sparse_product.BATCHES))
    torch.library.opcheck(
        torch.ops.bitpress_sparse.linear, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_a_product_is_compiled_once_for_any_number_of_tokens(device: torch.device) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    weight = prune(make_numbers((64, 64), torch.bfloat16, device), 2, 4)
    packed = sparse_product.pack(weight)
    algorithms = [0] * len(sparse_product.BATCHES)

    def run(inputs: torch.Tensor) -> torch.Tensor:
        return sparse_product.linear(inputs, packed, 64, torch.bfloat16, algorithms)

    inputs = make_numbers((5, 64), torch.bfloat16, device)
    traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(inputs)
    (output,) = (
        node for node in traced.graph.nodes if node.target == "output" or node.op == "output"
    )
    # a symbol, and not the five tokens that it was traced with
    assert not isinstance(output.args[0].meta["val"].shape[0], int)
