"""What people write by hand: safetensors and torch, one tensor after another. bfloat16 is saved through uint16.

usage: torch_convert.py SOURCE OUTPUT source|float16|bfloat16|float32 keep|dequantize
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

source, output = map(Path, sys.argv[1:3])
precision, mxfp4 = sys.argv[3:5]
target = None if precision == "source" else getattr(torch, precision)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.bfloat16)

output.mkdir(parents=True)
for file in sorted(source.glob("*.safetensors")):
    with safe_open(file, framework="pt") as tensors:
        names = list(tensors.keys())
        for name in names:
            if mxfp4 == "dequantize" and name.endswith("_scales"):
                continue
            tensor = tensors.get_tensor(name)
            if mxfp4 == "dequantize" and name.endswith("_blocks"):
                name = name.removesuffix("_blocks")  # noqa: PLW2901
                exponents = tensors.get_tensor(f"{name}_scales").to(torch.int32)[..., None] - 127
                codes = torch.stack([tensor & 0xF, tensor >> 4], -1).reshape(*tensor.shape[:-1], 32)
                values = torch.ldexp(E2M1[codes.to(torch.int32)], exponents)
                tensor = values.reshape(*tensor.shape[:-2], -1).to(target or torch.bfloat16)
            elif target is not None and tensor.is_floating_point():
                tensor = tensor.to(target)
            array = tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
            np.save(output / f"{name.replace('.', '_')}.npy", array)
