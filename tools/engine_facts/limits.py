"""What a class of vLLM's does with layers that its answers do not show, read in its code."""

from __future__ import annotations

from collections.abc import Iterable

# By model type, as it begins, and by the end of a layer's name in the files: what kind of limit
# there is, and why. The kinds are those of `EngineFacts.limits`.
LIMITS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (
        "gemma3n",
        (".altup.modality_router",),
        "never",
        "its class computes in the dtype of this weight, which must be the model's",
    ),
    (
        "gemma3n",
        (".altup.prediction_coefs", ".altup.correction_coefs"),
        "never",
        "its coefficients of about 1/2048 are less than the smallest number in 8 bits",
    ),
    (
        "bloom",
        (".query_key_value",),
        "rows_only",
        "its loader moves the rows of every tensor of this layer, of which all must have as many",
    ),
    (
        "granitemoehybrid",
        (".experts.*.gate_proj", ".experts.*.up_proj", ".experts.*.down_proj"),
        "input_global_scale",
        "its loader knows no scale of that name for the inputs of experts",
    ),
    (
        "deepseek_v4",
        (".attn.wo_a",),
        "never",
        "its class multiplies with this weight itself, in 16 bits or in FP8 of DeepSeek's own",
    ),
    (
        "gpt_oss",
        (".mlp.experts",),
        "whole",
        "its loader reads them in gpt-oss's MXFP4, in 16 bits, or in forms that no scheme has",
    ),
)


def find_limits(model_type: str, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The limits of an architecture's layers and modules, by their names with stars."""
    return {
        name: {kind: reason}
        for prefix, suffixes, kind, reason in LIMITS
        for name in names
        if model_type.startswith(prefix) and name.endswith(suffixes)
    }
