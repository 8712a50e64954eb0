"""llm-compressor's GPTQ solve of one layer, with GPTQModifier's defaults, in its own environment.

python llmcompressor_solve.py GIVEN OUT BITS GROUP; the last line printed is its CPU seconds.
"""

import sys
import time

import torch
from compressed_tensors.quantization import ActivationOrdering, QuantizationArgs, QuantizationScheme
from llmcompressor.entrypoints.model_free.lifecycle import initialize_quantized_linear
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.gptq.helpers import prepare_batch
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
torch.set_grad_enabled(False)
layer_file, out = sys.argv[1:3]
bits, group = map(int, sys.argv[3:])
layer = load_file(layer_file)
args = QuantizationArgs(
    num_bits=bits,
    strategy="group",
    group_size=group,
    symmetric=True,
    actorder=ActivationOrdering.STATIC,
)
module = initialize_quantized_linear(
    layer["weight"], QuantizationScheme(targets=["Linear"], weights=args), "cpu"
)
# their Hessian is of inputs times the root of 2
hessians, tokens = {module: 2 * layer["hessian"]}, {module: layer["tokens"]}
start = time.process_time()
initialize_observer(module, "weight")
observe([module], base_name="weight")
weights, hessians, scale, zero, globals_ = prepare_batch(
    [module], [module.weight_observer.get_qparams()], hessians, tokens
)
result, _, fallback = quantize_weight(
    weights, hessians, scale, zero, globals_, args, blocksize=128, percdamp=0.01
)
spent = time.process_time() - start
assert not fallback.any()
save_file({"weight": result[0].contiguous(), "scale": scale[0].contiguous()}, out)
print(spent)
