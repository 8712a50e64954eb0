"""Small synthetic checkpoints, for the tests of schemes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def llama_tensors(seed: int = 0, config: Mapping[str, Any] = LLAMA) -> dict[str, torch.Tensor]:
    """Synthetic bfloat16 weights of a Llama with this config, by tensor name."""
    generator = torch.Generator().manual_seed(seed)
    hidden_size, intermediate_size = config["hidden_size"], config["intermediate_size"]
    query_size = config["num_attention_heads"] * config["head_dim"]
    key_size = config["num_key_value_heads"] * config["head_dim"]

    def draw(rows: int, columns: int) -> torch.Tensor:
        weight: torch.Tensor = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return weight.bfloat16()

    tensors = {
        "model.embed_tokens.weight": draw(config["vocab_size"], hidden_size),
        "model.norm.weight": torch.ones(hidden_size).bfloat16(),
    }
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = draw(config["vocab_size"], hidden_size)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name, rows, columns in (
            ("self_attn.q_proj", query_size, hidden_size),
            ("self_attn.k_proj", key_size, hidden_size),
            ("self_attn.v_proj", key_size, hidden_size),
            ("self_attn.o_proj", hidden_size, query_size),
            ("mlp.gate_proj", intermediate_size, hidden_size),
            ("mlp.up_proj", intermediate_size, hidden_size),
            ("mlp.down_proj", hidden_size, intermediate_size),
        ):
            tensors[f"{block}.{name}.weight"] = draw(rows, columns)
        tensors[f"{block}.input_layernorm.weight"] = torch.ones(hidden_size).bfloat16()
        tensors[f"{block}.post_attention_layernorm.weight"] = torch.ones(hidden_size).bfloat16()
    return tensors


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    config: Mapping[str, Any] = LLAMA,
    shards: int = 1,
) -> Path:
    """Write a model folder and return it.

    Tensors go to the shards in turn, so that layers which engines fuse lie in different files.
    """
    folder.mkdir(parents=True)
    tensors = dict(llama_tensors(config=config) if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"made": "up"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        shard = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by relative name."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
