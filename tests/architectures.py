"""Tiny made-up models of the architectures that people have, written as transformers writes
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from calibrated import with_tokenizer

COMMON: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "topk_method": "noaux_tc",
}
MLA = {
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "head_dim": 64,
    "num_key_value_heads": 4,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LLAMA4 = {
    **EXPERTS,
    "num_experts_per_tok": 1,
    "intermediate_size": 64,
    "intermediate_size_mlp": 256,
    "interleave_moe_layer_step": 1,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_ssm": 256,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}


@frozen
class Architecture:
    """A model type of transformers.

    Attributes:
        what: what is special about it.
        keys: of its config, beside the common ones; of the text part where it has several.
        parts: configs of other parts, by key; the common keys then go to `text_config`.
    """

    what: str
    keys: Mapping[str, Any] = {}
    parts: Mapping[str, Mapping[str, Any]] = {}


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("dense"),
    "qwen3": Architecture("dense, tied head", {"tie_word_embeddings": True}),
    "mistral": Architecture("dense, sliding window"),
    "gemma3_text": Architecture("dense, four norms", {"tie_word_embeddings": True}),
    "granite": Architecture("dense, scaled"),
    "phi3": Architecture("fused qkv_proj and gate_up_proj"),
    "gpt2": Architecture(
        "transposed Conv1D",
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 256},
    ),
    "gpt_neox": Architecture("fused query_key_value"),
    "opt": Architecture("fc1 and fc2, biases", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
    "falcon": Architecture(
        "fused query_key_value",
        {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "mixtral": Architecture("experts (w1, w2, w3)", EXPERTS),
    "qwen2_moe": Architecture(
        "experts, a gated shared one", {**EXPERTS, "shared_expert_intermediate_size": 64}
    ),
    "qwen3_moe": Architecture("experts", EXPERTS),
    "deepseek_v3": Architecture("MLA, experts, shared experts", {**DEEPSEEK, **MLA}),
    "glm4_moe": Architecture("experts, shared experts", {**DEEPSEEK, "n_group": 1}),
    "gpt_oss": Architecture("fused, interleaved experts with biases", EXPERTS),
    "granitemoe": Architecture("fused experts under names of their own", EXPERTS),
    "llama4_text": Architecture("fused, transposed experts", LLAMA4),
    "llama4": Architecture(
        "fused, transposed experts, vision",
        LLAMA4,
        {
            "vision_config": {
                **VISION,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            }
        },
    ),
    "qwen3_next": Architecture(
        "linear attention, experts",
        {
            **EXPERTS,
            **HYBRID,
            "shared_expert_intermediate_size": 64,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
    ),
    "mamba2": Architecture(
        "state space",
        {"num_heads": 4, "head_dim": 64, "state_size": 16, "n_groups": 1, "expand": 2},
    ),
    "bamba": Architecture("state space and attention", {**MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": Architecture("state space beside attention", MAMBA),
    "qwen2_5_vl": Architecture(
        "vision",
        {
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
                "rope_theta": 10000.0,
            }
        },
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 128,
                "fullatt_block_indexes": [0],
            }
        },
    ),
    "qwen3_vl_moe": Architecture(
        "experts fused on disk, vision",
        {
            **EXPERTS,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [4, 6, 6],
                "rope_theta": 10000.0,
            },
        },
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 128,
                "deepstack_visual_indexes": [],
            }
        },
    ),
    "llava": Architecture(
        "vision",
        {"model_type": "llama"},
        {"vision_config": {**VISION, "model_type": "clip_vision_model"}},
    ),
    "gemma3": Architecture("vision", {}, {"vision_config": VISION}),
}

# those that vLLM 0.32 runs on a CPU; it has no way there for the others, or wants image processors
# beside them
SERVED = (
    "llama",
    "qwen3",
    "mistral",
    "gemma3_text",
    "granite",
    "phi3",
    "gpt_neox",
    "opt",
    "falcon",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v3",
    "glm4_moe",
    "llama4_text",
    "qwen3_next",
    "mamba2",
    "falcon_h1",
)


def build(model_type: str, folder: Path) -> Path:
    """The tiny model in a folder, bfloat16, with a tokenizer whose words are w0 ... w95, and a text
    of them beside it.
    """
    import transformers

    made = ARCHITECTURES[model_type]
    keys = {key: value for key, value in (COMMON | dict(made.keys)).items() if value is not None}
    torch.manual_seed(0)
    if made.parts:
        config = transformers.AutoConfig.for_model(
            model_type, text_config=keys, **{k: dict(v) for k, v in made.parts.items()}
        )
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    else:
        config = transformers.AutoConfig.for_model(model_type, **keys)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        # so that norms and biases are not all alike
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return with_tokenizer(folder)
