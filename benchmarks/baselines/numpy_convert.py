"""What people write by hand: safetensors and NumPy, one tensor after another.

usage: numpy_convert.py SOURCE OUTPUT source|float16|bfloat16|float32 keep|dequantize
"""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open

source, output = map(Path, sys.argv[1:3])
precision, mxfp4 = sys.argv[3:5]
target = {"source": None, "bfloat16": ml_dtypes.bfloat16}.get(precision, precision)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PAIRS = np.stack([np.tile(E2M1, 16), np.repeat(E2M1, 16)], -1)  # two values of each byte, low nibble first

output.mkdir(parents=True)
for file in sorted(source.glob("*.safetensors")):
    with safe_open(file, framework="np") as tensors:
        names = list(tensors.keys())
        for name in names:
            if mxfp4 == "dequantize" and name.endswith("_scales"):
                continue
            array = tensors.get_tensor(name)
            if mxfp4 == "dequantize" and name.endswith("_blocks"):
                name = name.removesuffix("_blocks")  # noqa: PLW2901
                scales = tensors.get_tensor(f"{name}_scales")
                values = np.ldexp(PAIRS[array].reshape(*array.shape[:-1], 32), scales.astype(np.int32)[..., None] - 127)
                array = values.reshape(*array.shape[:-2], -1).astype(target or ml_dtypes.bfloat16)
            elif target is not None and array.dtype in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64):
                array = array.astype(target)
            np.save(output / f"{name.replace('.', '_')}.npy", array)
