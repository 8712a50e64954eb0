"""The hooks of a scheme: this file is their specification.

A scheme is a module (or any object) with functions marked `@bitpress.hookimpl`, named by an entry
point in the group `bitpress.schemes`. A hook left out means that there is nothing to do. A
hook names the arguments it wants and gets only those. Hooks are pure: they leave their arguments
untouched, and never see a model, a file, a device, a rank or another layer.

The plan reads no tensor: it learns every stored shape by running the hooks on one row block of
zeros. So shapes and dtypes must follow from shapes and options, not from numbers.

Letters for axes: out and in are the rows and columns of a weight (for a stack, the rows of all
members one below the other); groups is the number of column groups that have a scale of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bitpress.schemes.hardware import Hardware
    from bitpress.schemes.options import Options
    from bitpress.schemes.values import CodeForm, Finding, Layer, Statistic, StoredLayer

# The version of bitpress-core in which a hook or an argument was last added or changed: what uses
# all of them requires it.
VERSION = "0.2"

hookspec = pluggy.HookspecMarker("bitpress")

hookimpl = pluggy.HookimplMarker("bitpress")


# Hooks get arguments by name: one that needs none but the first names no others.
@hookspec(firstresult=True)
def observe(  # noqa: PLR0913, PLR0917
    inputs: Tensor,
    reference: Tensor,
    residual: Tensor,
    output_gradient: Tensor,
    weight: Tensor,
    options: Options,
) -> Mapping[str, Statistic] | None:
    """Statistics that `rescale` and `quantize` will need, as raw sums or maxima.

    The core merges them over batches, row tiles and processes. A scheme whose `observe` names
    `inputs` is calibrated (unless `options.calibrated` says otherwise): it is called for every
    batch, and then once without inputs, for statistics of the weight alone. One that names
    `output_gradient` too is called with that, and without inputs, for some batches before all
    others. One that names only `weight` needs no data and is called once for each row tile.

    Args:
        inputs: (tokens, in) floating, as the already compressed layers before this one make them;
            None for weights alone.
        reference: (tokens, in) floating, the same tokens in the uncompressed model, for part of the
            batches; None for the others.
        residual: (tokens, out) floating, where `reference` is given and the layer's output is added
            to the residual stream: what that stream carries in the uncompressed model, less what
            it carries now, before the layer's output; otherwise None.
        output_gradient: (tokens, out) floating, of the model's loss with respect to the layer's
            output in the uncompressed model, where the tokens that follow are drawn from the
            model's own predictions; None where `inputs` are given, and for weights alone. A run
            makes gradients only for options with which the scheme takes statistics of them.
        weight: (out, in) float32, all rows of the layer or a tile of them.
        options: of the scheme.

    Returns:
        Statistics by name, float32, of a shape that does not depend on the number of tokens; one
        with a row for each of the weight's rows has `rows=True`. None where there is nothing to
        observe.
    """


@hookspec(firstresult=True)
def rescale(layer: Layer, stats: Mapping[str, Statistic], options: Options) -> Tensor | None:
    """Positive factors (in,) for the columns of the weight, as SmoothQuant and AWQ choose them.

    The core rounds the factors to 2^(k/8) with whole k, multiplies the columns, and folds the
    inverse into whatever produces the input: the function is unchanged but for the rounding of
    these tensors to their dtype. Where nothing could take the inverse it is not called.

    Returns:
        (in,) float32; None to leave the columns alone.
    """


@hookspec(firstresult=True)
def quantize(layer: Layer, stats: Mapping[str, Statistic], options: Options) -> Layer:
    """The layer with its weight replaced by numbers that can be stored.

    Promises: zeros stay zero; where `layer.mask` is False the weight stays zero; the shape does not
    change; rows depend on nothing but themselves, the others of their `options.row_block` and
    `stats`, but for rows that statistics of `output_gradient` relate; an all-zero row has finite,
    non-zero scales.

    `stats` holds what `observe` returned, and in a calibrated run what the steps before this one
    have observed.

    Without statistics of inputs (`stats` lacks them: the layer never saw a token, or the plan asks
    for shapes) it rounds to nearest. What the user should know of a layer goes to `warnings.warn`:
    the core adds the layer's name.

    Returns:
        `attrs.evolve(layer, weight=..., codes=..., qparams=...)`. `weight` is float32 and exactly
        what the stored codes decode to; it may be a function of no arguments.

    Raises:
        ShapeError: the width does not fit; the message names one that does.
    """


@hookspec(firstresult=True)
def keep_codes(
    form: CodeForm, shape: tuple[int, int], dtype: torch.dtype, options: Options
) -> Options | None:
    """The options with which `quantize` keeps the codes of a source, where it can store them to the
    bit: the same options, but for how weights are rounded.

    The layer then gets these options in place of the user's, and `layer.quantized`. It needs
    statistics of inputs only as far as these options do. Where numbers turn out not to fit
    after all, `quantize` rounds to nearest, and the core tells the user.

    Args:
        form: of the codes.
        shape: (out, in) of the weight.
        dtype: what the model stores its weights in.
        options: that the user has chosen.

    Returns:
        Options of the scheme, with which the same is stored for the same shape; None where codes
        are rounded again.
    """


@hookspec(firstresult=True)
def pack(layer: Layer, options: Options) -> Layer:
    """The layer with `codes` and `qparams` as the bits on disk: only bits change, `weight` does
    not.
    """


@hookspec(firstresult=True)
def serialize(layer: Layer, stored: StoredLayer | None, options: Options) -> StoredLayer:
    """The stored tensors of one linear layer and the config fragment that tells a loader how to
    read them.

    `layer` holds all rows of one member of a stack; where it has codes, its weight is NaN and only
    the shape may be used. Of the steps of a composition, the last that has this hook writes. Those
    before it are asked only where they name `stored`: they may lay out anew what it wrote, and
    `expand` is then the inverse.

    Args:
        layer: packed.
        stored: what a step after this one stores; None where there is none.
        options: of the scheme.
    """


@hookspec(firstresult=True)
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """What to expect on a device, best news first; at least one finding for any device.

    It is asked of devices that are not there: it must need none.
    """


@hookspec(firstresult=True)
def validate_shape(
    shape: tuple[int, int], cut: str | None, hardware: Hardware, options: Options
) -> Sequence[Finding] | None:
    """What engines make of a layer of this shape on a device.

    Args:
        shape: (out, in) of what one rank of a tensor-parallel engine holds of the layer.
        cut: "rows" or "columns", along which the layer was cut for that; None where a rank holds
            all of it.
        hardware: the device.
        options: of the scheme.

    Returns:
        Findings; none, or None, where there is nothing to say.
    """


@hookspec(firstresult=True)
def dequantize(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Tensor:
    """The effective weight, from what `serialize` stored: the inverse of `pack` and `serialize`.

    Args:
        tensors: what `serialize` stored of the layer, or some rows of each, after `expand`.
        config: the layer's config fragment.

    Returns:
        (out, in) float32; NaN where a loader would read NaN.
    """


@hookspec(firstresult=True)
def expand(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> Mapping[str, Tensor] | None:
    """What `serialize` was given as `stored`, or would have stored in its plain layout.

    Args:
        tensors: what is stored of the layer, or some rows of each.
        config: the layer's config fragment.

    Returns:
        The tensors by suffix, from which `dequantize` makes the weight; None where they are laid
        out plainly.
    """


@hookspec(firstresult=True)
def quantize_activations(
    inputs: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> Tensor | None:
    """The numbers that a loader computes with in place of a layer's inputs.

    For `eval`, which runs the model as it will be served. A scheme whose config names
    `input_activations` needs it; others leave it out. Where loaders differ, compressed-tensors'
    rule counts.

    Args:
        inputs: (tokens, in) float32.
        tensors: what `serialize` stored of the layer under names that begin with `input_`.
        config: the layer's config fragment.

    Returns:
        (tokens, in) float32; None where inputs are not rounded.
    """


@hookspec(firstresult=True)
def validate_weight(weight: Tensor, options: Options) -> str | None:
    """Which promise of the scheme's an effective weight breaks.

    `verify` asks every step of a layer, whichever of them wrote the file.

    Args:
        weight: (out, in) float32, some rows of a layer, dequantized.
        options: of the scheme.

    Returns:
        A few words for the user; None where the weight breaks none.
    """


# Hooks get arguments by name: one that needs none but the first two names no others.
@hookspec(firstresult=True)
def error_bound(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    weight: Tensor,
    bound: Tensor | None,
    options: Options,
) -> Tensor | None:
    """How far the scheme may have moved each weight.

    Every run, and `verify`, hold the source's weight against it. In a composition every step is
    asked, the last first.

    Args:
        tensors: what is stored of the layer, or some rows of each, after `expand`: by the scheme
            itself, or by a step after it.
        config: the layer's config fragment.
        weight: (out, in) float32, what `tensors` decode to.
        bound: how far the steps after this one may have moved each weight, broadcastable to
            (out, in); None where there are none.
        options: of the scheme.

    Returns:
        Non-negative float32 that broadcasts to (out, in), what the steps after this one have moved
        included. None, or no hook, where no such bound exists (error feedback moves weights on
        purpose).
    """


@hookspec(firstresult=True)
def observe_cache(states: Tensor, options: Options) -> Mapping[str, Statistic] | None:
    """Statistics of what the attention functions of a model are given, as raw sums or maxima.

    A scheme that has `serialize_cache` is not for linear layers: it says how an engine keeps the
    keys and values of the tokens that it has seen. It is calibrated, and called for the queries,
    the keys and the values of every batch.

    Args:
        states: (tokens, heads, channels) floating: queries or keys after the rotation, or values,
            as the compressed layers before the attention make them.
        options: of the scheme.

    Returns:
        Statistics by name, float32, of a shape that does not depend on the number of tokens.
    """


@hookspec(firstresult=True)
def serialize_cache(
    stats: Mapping[str, Mapping[str, Statistic]], dtype: torch.dtype, options: Options
) -> StoredLayer:
    """The tensors that are stored beside an attention's weights, and the `kv_cache_scheme` of the
    config, which must be the same for all of them.

    Args:
        stats: what `observe_cache` returned of all batches, merged: of "query", "key" and "value".
        dtype: what the model stores its weights in.
        options: of the scheme.
    """


@hookspec(firstresult=True)
def quantize_cache(
    states: Tensor, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> Tensor:
    """Keys or values as an engine reads them back from its cache.

    For `eval`, which runs the model as it will be served.

    Args:
        states: (tokens, heads, channels) float32.
        name: "key" or "value".
        tensors: what `serialize_cache` stored.
        config: the `kv_cache_scheme`.

    Returns:
        Of the same shape, float32.
    """
