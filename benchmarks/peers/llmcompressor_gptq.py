"""llm-compressor's GPTQ, in its own environment: python llmcompressor_gptq.py MODEL OUT SCHEME
TEXTS SAMPLES LENGTH.
"""

import json
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import GPTQModifier  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

source, out, scheme, texts = sys.argv[1:5]
samples, length = map(int, sys.argv[5:])
tokenizer = AutoTokenizer.from_pretrained(source)
text = "\n".join(json.loads(line)["text"] for line in Path(texts).read_text().splitlines())
ids = tokenizer(text, verbose=False)["input_ids"][: samples * length]
data = {
    "input_ids": [ids[i * length : (i + 1) * length] for i in range(samples)],
    "attention_mask": [[1] * length] * samples,
}
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
oneshot(
    model=model,
    dataset=Dataset.from_dict(data),
    recipe=GPTQModifier(targets="Linear", scheme=scheme, ignore=["lm_head"]),
    max_seq_length=length,
    num_calibration_samples=samples,
)
model.save_pretrained(out, save_compressed=True)
