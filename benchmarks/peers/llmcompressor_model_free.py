"""llm-compressor's path without calibration, in its own environment: python
llmcompressor_model_free.py MODEL OUT SCHEME.
"""

import sys

import torch

torch.set_num_threads(1)
from llmcompressor import model_free_ptq  # noqa: E402

model, out, scheme = sys.argv[1:]
model_free_ptq(
    model_stub=model,
    save_directory=out,
    scheme=scheme,
    ignore=["lm_head", "re:.*embed.*"],
    max_workers=1,
    device="cpu",
)
