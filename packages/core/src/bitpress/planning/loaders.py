"""What is known of how vLLM and transformers load a plan's result: only that is claimed of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.engine_facts import engines_without, facts_of, is_embedding
from bitpress.planning import tensor_parallel
from bitpress.planning.engine_layers import PACKED_FORMAT
from bitpress.planning.plan import Plan
from bitpress.schemes.hardware import DEVICES, describe_devices
from bitpress.schemes.values import USABLE

# Where transformers 5.24 converts experts to the tensors that it computes with, right to the last
# bits: symmetric packed integers, and 8-bit floats per tensor or channel. Of the others it raises
# errors, or leaves a scale out without a word.
PLAIN_SCALES = ("tensor", "channel")

# How the config names the dtypes of scales in a byte: E8M0 and E4M3.
SMALL_SCALES = ("torch.uint8", "torch.float8_e4m3fn")


@frozen
class Loaders:
    """How loaders take an output.

    Attributes:
        vllm_devices: on which vLLM runs it: "NVIDIA 8.9+, some AMD"; None where it does not, or
            where that is not known.
        vllm_reason: why it is not said that vLLM loads it; None where it is.
        vllm_plugins: the packages that vLLM needs for it.
        transformers_reason: the same of transformers.
        needs_dequantizing: whether transformers loads it only when it is told to dequantize.
    """

    vllm_devices: str | None
    vllm_reason: str | None
    vllm_plugins: tuple[str, ...]
    transformers_reason: str | None
    needs_dequantizing: bool


def describe_loaders(plan: Plan) -> Loaders:
    """How loaders will take a plan's result."""
    devices, reason = _explain_vllm(plan)
    plugins = {step.options.vllm_plugin for step in plan.recipe.all_steps}
    return Loaders(
        devices,
        reason,
        tuple(sorted(plugin for plugin in plugins if plugin is not None)),
        next(_explain_transformers(plan), None),
        _has_embeddings(plan) or any(map(_has_zero_points, plan.fragments.values())),
    )


def _explain_vllm(plan: Plan) -> tuple[str | None, str | None]:
    """The devices on which vLLM runs it; or why that is not claimed."""
    for engine in engines_without(plan.source.config):
        if engine.startswith("vLLM"):
            return None, f"{engine} does not list this architecture"
    if reason := tensor_parallel.explain_refusal(plan):
        return None, reason

    usable, refusal = [], None
    steps = list(dict.fromkeys(plan.recipe.all_steps))
    for device in DEVICES:
        all_findings = [step.call("validate_hardware", hardware=device) for step in steps]
        # of each step the best news
        best = [findings[0] for findings in all_findings if findings]
        if len(best) == len(steps) and all(finding.level in USABLE for finding in best):
            usable.append(device)
        refused = [finding.text for finding in best if finding.level == "unsupported"]
        refusal = refusal or next(iter(refused), None)
    if not usable:
        return None, refusal or "on which devices it runs is not known"
    return describe_devices(usable, DEVICES), None


def _explain_transformers(plan: Plan) -> Iterator[str]:
    """Reasons why it is not said that transformers loads it."""
    for engine in engines_without(plan.source.config):
        if engine.startswith("transformers"):
            yield f"{engine} does not list this architecture"
    formats = [fragment for fragment in plan.fragments.values() if fragment is not None]
    if _has_embeddings(plan) and any(fragment != formats[0] for fragment in formats):
        yield (
            "it reads compressed embeddings only where it dequantizes weights while it loads them, "
            "and does so in one format alone"
        )
    for stack in plan.stacks:
        for step in stack.steps:
            if step.options.transformers_reason is not None:
                yield step.options.transformers_reason
        for module in stack.members:
            yield from _explain_layer(plan, module)


def _has_embeddings(plan: Plan) -> bool:
    """Whether embeddings are compressed: transformers 5.24 computes with the weight of a module of
    this class at once, and compressed-tensors 0.20 leaves it packed until the first forward pass.
    """
    engines = facts_of(plan.source.config)
    return any(is_embedding(module, engines) for module in plan.fragments)


def _explain_layer(plan: Plan, module: str) -> Iterator[str]:
    """Why a layer of this model may not load, where others in its format do."""
    fragment = plan.fragments[module]
    if fragment is None:
        return
    weights = fragment.get("weights") or {}
    if decodes_to_bfloat16(weights) and plan.dtype != torch.bfloat16:
        yield "transformers decodes this format to bfloat16, and the model is in another dtype"
    if layer_names.OF_EXPERT.fullmatch(module) and not _is_expert_format(weights):
        yield "transformers does not convert experts in this format rightly"


def decodes_to_bfloat16(weights: Mapping[str, Any]) -> bool:
    """Whether transformers makes bfloat16 weights of a format in a model of any dtype: of floats
    whose scales are small floats too.
    """
    return weights.get("type") == "float" and weights.get("scale_dtype") in SMALL_SCALES


def _is_expert_format(weights: Mapping[str, Any]) -> bool:
    """Whether transformers converts experts that are stored so."""
    if weights.get("type") == "float":
        return weights.get("num_bits") == 8 and weights.get("strategy") in PLAIN_SCALES
    is_symmetric = bool(weights.get("symmetric", True))
    return is_symmetric and int(weights.get("num_bits") or 8) < 8


def _has_zero_points(fragment: Mapping[str, Any] | None) -> bool:
    """Whether a layer packs zero points beside its integers.

    transformers 5.24 with compressed-tensors 0.20 makes room for them unpacked, and takes no file
    that packs them, unless it dequantizes the weights while it loads them.
    """
    if fragment is None or fragment.get("format") != PACKED_FORMAT:
        return False
    return not (fragment.get("weights") or {}).get("symmetric", True)
