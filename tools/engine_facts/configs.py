"""A config of every architecture that generates text, and the tensors that its files hold."""

from __future__ import annotations

import functools
import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto

from bitpress.checkpoint.layer_names import star

Json = dict[str, Any]

# Where the core has the answers.
FACTS = Path(__file__).parents[2] / "packages/core/src/bitpress/checkpoint/engines"

# Tasks of transformers whose models generate text.
TASKS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)

# What configs call the number of experts, and how many are enough to name them.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MAX_EXPERTS = 16

# The file, its architectures, one of them, and its layers: what is deeper stands in one line.
MAX_DEPTH = 4

# Model types whose published files do not name the part that has no head.
PUBLISHED_WITHOUT_PREFIX = ("deepseek_v4",)

# Model types of vision towers that timm builds.
TIMM_MODELS = ("gemma3n_vision", "timm_wrapper")

GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": MAX_EXPERTS,
    "top_k_experts": 2,
    "moe_intermediate_size": 704,
}

LFM2_BLOCK = {
    "block_dim": 2560,
    "block_ff_dim": 12288,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "block_use_swiglu": True,
}

# Values that an engine reads and the default config of a model type lacks, as published models have
# them; a dictionary changes the config of that part.
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {
        "score_func": "sigmoid",
        "route_scale": 1.0,
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
    },
    # vLLM computes while it builds this one, on the CPU.
    "apertus": {
        "num_hidden_layers": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "vocab_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "aya_vision": {"vision_config": {"hidden_size": 64, "num_attention_heads": 4}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "deepseek_v32": {"topk_method": "noaux_tc"},
    "ernie4_5_vl_moe": {
        "vision_config": {"embed_dim": 64, "mlp_ratio": 4, "hidden_size": 64, "num_heads": 4},
        "pixel_hidden_size": 64,
    },
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "gemma4": {
        "vision_config": transformers.AutoConfig.for_model("gemma4_vision"),
        "text_config": GEMMA4_EXPERTS,
    },
    "gemma4_text": GEMMA4_EXPERTS,
    "glm4_moe": {"head_dim": 128},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "glm4v_moe": {"text_config": {"head_dim": 128, "use_qk_norm": False}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 1536},
    "lfm2": LFM2_BLOCK,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_vl": {"text_config": LFM2_BLOCK},
    "longcat_flash": {
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "zero_expert_type": "identity",
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1] * 24,
        "layernorm_epsilon": 1e-5,
        "swa_num_attention_heads": 64,
        "swa_num_key_value_heads": 8,
        "swa_head_dim": 192,
        "swa_v_head_dim": 128,
    },
    "ministral": {"head_dim": 128},
    "minimax_m2": {"rotary_dim": 64, "scoring_func": "sigmoid"},
    "nemotron": {"num_key_value_heads": 8},
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
    "voxtral": {"audio_config": {"downsample_factor": 4, "window_size": None}},
}


def architectures() -> list[str]:
    """Every architecture that transformers generates text with."""
    names: set[str] = set()
    for task in TASKS:
        for classes in getattr(modeling_auto, task, {}).values():
            names.update((classes,) if isinstance(classes, str) else classes)
    return sorted(names)


def make_config(architecture: str) -> Any:
    """The default config of an architecture, with what engines ask for beside."""
    config = getattr(transformers, architecture).config_class()
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key in EXPERT_COUNTS:
            count = getattr(part, key, None)
            if isinstance(count, int) and count > MAX_EXPERTS:
                setattr(part, key, MAX_EXPERTS)
    _override(config, OVERRIDES.get(config.model_type, {}))
    config.architectures = [architecture]
    return config


def _override(config: Any, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        part = getattr(config, key, None)
        if isinstance(value, Mapping) and part is not None and not isinstance(part, dict):
            _override(part, value)
        else:
            setattr(config, key, value)


def skip_timm() -> None:
    """Build nothing for a vision tower of timm, which wants torchvision: it is never quantized."""
    build_from_config = transformers.AutoModel.from_config

    def from_config(config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if config.model_type in TIMM_MODELS:
            return torch.nn.Identity()
        model: torch.nn.Module = build_from_config(config, *args, **kwargs)
        return model

    transformers.AutoModel.from_config = from_config


def build_model(architecture: str, config: Any) -> torch.nn.Module:
    """Transformers' model on the meta device."""
    with torch.device("meta"):
        model: torch.nn.Module = getattr(transformers, architecture)(config).to(torch.bfloat16)
    return model


def file_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's files by name, tied ones included, on the meta device.

    A model that was made from its config is written without some of the prefixes that published
    files have: both names are given.
    """
    state = dict(model.state_dict())
    tensors = dict(revert_weight_conversion(model, state))
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False) or None
    tensors |= revert_weight_conversion(model, state)
    if model.config.model_type in PUBLISHED_WITHOUT_PREFIX:
        prefix = f"{model.base_model_prefix}."
        tensors |= {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    # transformers 5.19 writes one part too many for models with a tower of audio; 5.24 does not.
    return {
        name.replace("language_model.model.model.", "language_model.model."): tensor
        for name, tensor in tensors.items()
        if tensor.is_meta
    }


def star_like(name: str, renamed: str) -> str:
    """Another name of a layer with stars for the numbers that both have."""
    pattern = star(renamed)
    return pattern if pattern.count("*") <= star(name).count("*") else renamed


def layer_name(tensor: str) -> str:
    """The layer that a tensor of the files belongs to; the tensor itself where it is no weight."""
    return tensor.removesuffix(".weight")


def write_facts(engine: str, version: str, ask: Callable[[str], Json]) -> None:
    """Ask an engine about every architecture, and write the answers, one layer a line.

    The command line may name a pattern of the architectures; what is known of others then stays.

    Args:
        ask: the answer for an architecture; raises whatever a library does for a config that it
            does not like.
    """
    only = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    release = ".".join(version.split(".")[:2])
    path = FACTS / f"{engine.lower()}-{release}.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["architectures"] if path.exists() else {}
    table = {name: answer for name, answer in kept.items() if not only.search(name)}
    table |= _answers(ask, only)
    document = {"engine": engine, "version": version, "architectures": dict(sorted(table.items()))}
    path.write_text(_format(document) + "\n", encoding="utf-8")


def _answers(ask: Callable[[str], Json], only: re.Pattern[str]) -> Iterator[tuple[str, Json]]:
    """The answers, each of a process of its own: engines change transformers' classes."""
    names = list(filter(only.search, architectures()))
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name, answer in zip(names, pool.imap(functools.partial(_try, ask), names), strict=True):
            if answer is not None:
                yield name, answer


def _try(ask: Callable[[str], Json], architecture: str) -> Json | None:
    try:
        return ask(architecture)
    except Exception as e:
        # Whatever a library raises for a config that it does not like: its facts are missing then.
        reason = " ".join(str(e).split())[:200]
        print(f"{architecture}: {type(e).__name__}: {reason}", file=sys.stderr, flush=True)
        return None


def _format(value: Any, depth: int = 0) -> str:
    """JSON with a line for each layer, whose own facts stand in it."""
    if not isinstance(value, dict) or not value or depth == MAX_DEPTH:
        return json.dumps(value, ensure_ascii=False)
    indent = " " * (depth + 1)
    lines = [
        f"{indent}{json.dumps(key)}: {_format(item, depth + 1)}" for key, item in value.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
