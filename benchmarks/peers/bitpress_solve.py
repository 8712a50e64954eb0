"""Our GPTQ solve of one layer: python bitpress_solve.py GIVEN OUT BITS GROUP; the last line printed
is its CPU seconds.
"""

import sys
import time

import torch
from safetensors.torch import load_file, save_file

from bitpress import Layer, Statistic
from bitpress_w4a16 import w4a16

torch.set_num_threads(1)
layer_file, out = sys.argv[1:3]
bits, group = map(int, sys.argv[3:])
options = w4a16.Options(group_size=group)
assert options.bits == bits
layer = load_file(layer_file)
stats = {name: Statistic(layer[name], "sum") for name in ("hessian", "tokens")}
start = time.process_time()
solved = w4a16.quantize(Layer("layer", layer["weight"], torch.float32), stats, options)
spent = time.process_time() - start
save_file({"weight": solved.weight, "scale": solved.qparams["scale"]}, out)
print(spent)
