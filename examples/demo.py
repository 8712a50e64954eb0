"""Compress a small real model to FP8, and show size and perplexity before and after.

    python examples/demo.py [OUT]

Perplexity is computed by transformers, which reads the compressed files through compressed-tensors,
as a user of the result would.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
# tokens
WINDOW = 512


def perplexity(model: Path, text: str) -> float:
    """The exponential of the mean loss over the text's tokens, in windows that do not overlap,
    computed in float32.
    """
    ids = torch.tensor(
        AutoTokenizer.from_pretrained(model)(text, verbose=False)["input_ids"]
    )  # (tokens,)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loss, count = 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(ids) - 1, WINDOW):
            window, target = ids[at : at + WINDOW], ids[at + 1 : at + WINDOW + 1]
            logits = network(window[: len(target)].unsqueeze(0), use_cache=False).logits[
                0
            ]  # (tokens, vocabulary)
            loss += torch.nn.functional.cross_entropy(
                logits.float(), target, reduction="sum"
            ).item()
            count += len(target)
    return math.exp(loss / count)


def main() -> None:
    """Compress the model that lies beside this file, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "out",
        nargs="?",
        type=Path,
        default=Path("demo-output"),
        help="a folder for the result; made anew",
    )
    out = parser.parse_args().out / "tiny-llama-fp8"
    shutil.rmtree(out, ignore_errors=True)
    source = HERE / "tiny-llama"
    for arguments in (["schemes"], ["compress", str(source), str(out), "--scheme", "fp8"]):
        print(f"\n$ bitpress {' '.join(arguments)}", flush=True)
        subprocess.run([sys.executable, "-m", "bitpress", *arguments], check=True)
    text = (HERE / "chapters.txt").read_text(encoding="utf-8")
    print(f"\n{'':16}{'weight files':>14}{'perplexity':>14}")
    for name, model in (("before", source), ("after (fp8)", out)):
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        print(f"{name:16}{size / 1e6:>11.2f} MB{perplexity(model, text):>14.3f}", flush=True)


if __name__ == "__main__":
    main()
