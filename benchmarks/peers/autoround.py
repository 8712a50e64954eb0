"""AutoRound with its defaults, in its own environment: python autoround.py MODEL OUT SCHEME TEXTS
SAMPLES LENGTH.
"""

import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from auto_round import AutoRound  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

source, out, scheme, texts = sys.argv[1:5]
samples, length = map(int, sys.argv[5:])
tokenizer = AutoTokenizer.from_pretrained(source)
text = "\n".join(json.loads(line)["text"] for line in Path(texts).read_text().splitlines())
ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: samples * length]).view(
    samples, length
)
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
rounding = AutoRound(
    model,
    tokenizer,
    scheme=scheme,
    dataset=list(ids.split(1)),
    nsamples=samples,
    seqlen=length,
    batch_size=min(samples, 8),
    device_map="cpu",
    enable_torch_compile=False,
)
rounding.quantize_and_save(out, format="auto_round")
# it makes a folder of its own there
for file in Path(out).glob("*/*"):
    file.rename(Path(out) / file.name)
