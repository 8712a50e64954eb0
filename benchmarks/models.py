"""Deterministic made-up Llamas of any size, written with the safetensors library.

    python benchmarks/models.py OUT --blocks 8 --hidden 2048 --intermediate 8192 --shards 1

The numbers are drawn from a normal distribution with one seed per tensor, so that the same flags
give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).parents[1] / "examples/tiny-llama"
# of its tokenizer
VOCABULARY = 4096


def shapes(blocks: int, hidden: int, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama with grouped-query attention (four query heads to a key head), in
    file order.
    """
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for i in range(blocks):
        block = f"model.layers.{i}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{block}.self_attn.k_proj.weight", (hidden // 4, hidden)
        yield f"{block}.self_attn.v_proj.weight", (hidden // 4, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{block}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"{block}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of bfloat16, always the same for a name: ones for a vector, else normal."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def make(out: Path, blocks: int, hidden: int, intermediate: int, shards: int = 1) -> None:
    """Write the model into `out`, with tiny-llama's tokenizer; nothing is done where the same model
    is there already.
    """
    heads = hidden // 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    text = json.dumps(config, indent=2)
    if (out / "config.json").is_file() and (out / "config.json").read_text() == text:
        return
    out.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, out)
    everything = list(shapes(blocks, hidden, intermediate))
    per_shard = math.ceil(len(everything) / shards)
    weight_map = {}
    for i in range(shards):
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = {
            name: draw(name, shape)
            for name, shape in everything[i * per_shard : (i + 1) * per_shard]
        }
        save_file(part, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    (out / "config.json").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--shards", type=int, default=1)
    make(**vars(parser.parse_args()))
