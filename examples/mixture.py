"""Make a small mixture of experts, compress it, and hold its perplexity to the bounds that the
dense model keeps.

    python examples/mixture.py [OUT] [--tokens 100000]

The mixture grows out of tiny-llama: every block's MLP is copied into four experts, slightly
changed, with a new router, and the whole is trained on the text that ships with bitpress, so that
its experts become unlike. On one core that takes some minutes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import bitpress
from bitpress.modeling import bundled_texts

HERE = Path(__file__).parent
EXPERTS, CHOSEN = 4, 2
# tokens of a sequence, sequences of a step
LENGTH, BATCH = 128, 8
RATE = 3e-4
# of the weights' own size, by which experts differ at first
SPREAD = 0.1
# the most that log-perplexity may rise, in nats per token: a little over what other tools lose on
# the dense tiny-llama
BOUNDS = {"fp8": 0.005, "w4a16": 0.010, "nvfp4": 0.025}


def grown() -> MixtralForCausalLM:
    """A Mixtral with tiny-llama's attention, and experts like its MLPs."""
    dense = AutoModelForCausalLM.from_pretrained(HERE / "tiny-llama", dtype=torch.float32)
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    more = (
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
    )
    config = MixtralConfig(
        **{key: getattr(dense.config, key) for key in (*keys, *more, "pad_token_id")},
        tie_word_embeddings=True,
        sliding_window=None,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
    )
    model = MixtralForCausalLM(config)
    weights = dense.state_dict()
    model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if ".mlp." not in name}, strict=False
    )
    for index, block in enumerate(model.model.layers):
        gate, up, down = (
            weights[f"model.layers.{index}.mlp.{leaf}_proj.weight"]
            for leaf in ("gate", "up", "down")
        )
        for fused, weight in (
            (block.mlp.experts.gate_up_proj, torch.cat([gate, up])),
            (block.mlp.experts.down_proj, down),
        ):
            noise = torch.randn(fused.shape) * weight.std() * SPREAD
            fused.data.copy_(weight + noise)
    return model


def train(model: MixtralForCausalLM, ids: torch.Tensor, tokens: int) -> None:
    """So many tokens of a text, once or more often, in sequences drawn anew each time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    steps = tokens // (LENGTH * BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps + 1, pct_start=0.1
    )
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def main() -> None:
    """Make the mixture, compress it, and exit 1 where it loses more than the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "out",
        nargs="?",
        type=Path,
        default=Path("mixture-output"),
        help="a folder for the results; made anew",
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="to train on")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    source = arguments.out / "tiny-mixtral"
    torch.manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(HERE / "tiny-llama"), grown()
    (row,) = bundled_texts.read_rows("prose")
    train(model, torch.tensor(tokenizer(row["text"], verbose=False)["input_ids"]), arguments.tokens)
    model.config.output_router_logits = False
    model.bfloat16().save_pretrained(source)
    tokenizer.save_pretrained(source)

    print(
        f"\n{'scheme':8}{'weight files':>14}{'perplexity':>12}{'rise':>10}{'bound':>8}{'KL':>10}"
        f"{'tokens to an expert':>22}"
    )
    missed = []
    for scheme, bound in BOUNDS.items():
        manifest = bitpress.compress(
            source, arguments.out / scheme, scheme=scheme, samples=96, check=HERE / "chapters.txt"
        )
        size = sum(
            file.bytes for name, file in manifest.files.items() if name.endswith(".safetensors")
        )
        sent = [layer.tokens for layer in manifest.layers.values() if layer.tokens is not None]
        range_of = f"{min(sent):,} to {max(sent):,}" if sent else "-"
        result = manifest.check
        assert result is not None
        assert result.rise is not None
        figures = f"{result.perplexity:>12.3f}{result.rise:>+10.5f}{bound:>8.3f}{result.kl:>10.5f}"
        print(f"{scheme:8}{size / 1e6:>11.2f} MB{figures}{range_of:>22}", flush=True)
        missed += [scheme] if result.rise > bound else []
    print(f"the source's perplexity on {HERE.name}/chapters.txt: {result.source_perplexity:.3f}")
    if missed:
        sys.exit(f"{', '.join(missed)}: perplexity rises by more than the bound")


if __name__ == "__main__":
    main()
