"""GPTQModel's GPTQ, in its own environment: python gptqmodel_gptq.py MODEL OUT SCHEME TEXTS SAMPLES
LENGTH.
"""

import json
import os
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
# it cannot be imported on two cores otherwise
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
from gptqmodel import GPTQModel, QuantizeConfig  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

source, out, scheme, texts = sys.argv[1:5]
samples, length = map(int, sys.argv[5:])
assert scheme == "W4A16"
tokenizer = AutoTokenizer.from_pretrained(source)
text = "\n".join(json.loads(line)["text"] for line in Path(texts).read_text().splitlines())
ids = tokenizer(text, verbose=False)["input_ids"][: samples * length]
data = [
    {"input_ids": ids[i * length : (i + 1) * length], "attention_mask": [1] * length}
    for i in range(samples)
]
model = GPTQModel.load(source, QuantizeConfig(bits=4, group_size=128, device="cpu"))
model.quantize(data, batch_size=1)
model.save(out)
