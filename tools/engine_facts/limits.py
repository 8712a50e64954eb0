"""What a class of vLLM's does with layers that its answers do not show, read in its code."""

from __future__ import annotations

from collections.abc import Mapping

GLOBAL_SCALE = (
    "input_global_scale",
    "its loader knows no scale of that name for the inputs of experts",
)

# By model type, as it begins, and by the end of a layer's name in the files.
NEVER: Mapping[tuple[str, str], str] = {
    ("gemma3n", ".altup.modality_router"): (
        "its class computes in the dtype of this weight, which must be the model's"
    ),
    ("gemma3n", ".altup.prediction_coefs"): (
        "its coefficients of about 1/2048 are less than the smallest number in 8 bits"
    ),
    ("gemma3n", ".altup.correction_coefs"): (
        "its coefficients of about 1/2048 are less than the smallest number in 8 bits"
    ),
}

# Layers of which every stored tensor must have a row for each of the layer's.
ROWS_ONLY: Mapping[tuple[str, str], str] = {
    ("bloom", ".query_key_value"): (
        "its loader moves the rows of every tensor of this layer, of which all must have as many"
    ),
}

# Stored tensors that a loader does not find a parameter for.
UNREAD: Mapping[tuple[str, str], tuple[str, str]] = {
    ("granitemoehybrid", ".experts.*.gate_proj"): GLOBAL_SCALE,
    ("granitemoehybrid", ".experts.*.up_proj"): GLOBAL_SCALE,
    ("granitemoehybrid", ".experts.*.down_proj"): GLOBAL_SCALE,
}


def find_limits(model_type: str, layers: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """The limits of an architecture's layers, by their names with stars."""
    limits: dict[str, dict[str, str]] = {}
    for key, table in (("never", NEVER), ("rows_only", ROWS_ONLY)):
        for (prefix, suffix), reason in table.items():
            if model_type.startswith(prefix):
                names = [name for name in layers if name.endswith(suffix)]
                limits |= {name: {key: reason} for name in names}
    for (prefix, suffix), (tensor, reason) in UNREAD.items():
        if model_type.startswith(prefix):
            names = [name for name in layers if name.endswith(suffix)]
            limits |= {name: {tensor: reason} for name in names}
    return limits
