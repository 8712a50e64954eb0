"""How far an output's predictions are from its source's, through transformers: python divergence.py
SOURCE OUT TEXT TOKENS.

Run in the environment that wrote OUT, or another whose transformers reads it. The last line printed
is the KL divergence from the source, mean over the first tokens of a text, in nats a token. It is
run in sequences as long as those of calibration, which begin as the tokenizer begins a text.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# tokens of a sequence
LENGTH = 512

torch.set_num_threads(1)
source, out, text = sys.argv[1:4]
tokens = int(sys.argv[4])
# of these formats transformers makes bfloat16 weights
BFLOAT16_FORMATS = ("nvfp4", "mxfp4", "mxfp8")
config = (Path(out) / "config.json").read_text()
dtype = torch.bfloat16 if any(name in config for name in BFLOAT16_FORMATS) else torch.float32
tokenizer = AutoTokenizer.from_pretrained(source)
start = torch.tensor(tokenizer("")["input_ids"], dtype=torch.int64)
ids = tokenizer(
    Path(text).read_text(), verbose=False, return_tensors="pt", add_special_tokens=False
)["input_ids"][0]
count = max(tokens // LENGTH, 1)
texts = ids[: count * (LENGTH - len(start))].view(count, -1)
ids = torch.cat([start.expand(count, -1), texts], 1)  # (sequences, length)


def predicted(model: str, dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities (sequences, tokens, vocabulary)."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    with torch.inference_mode():
        return loaded(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


truth = predicted(source, torch.float32)
print(float((truth.exp() * (truth - predicted(out, dtype))).sum(-1).mean()))
