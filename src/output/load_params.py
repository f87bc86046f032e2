"""Loads this folder as {name: jax.Array}. Needs only jax: python -i load_params.py"""

import json
from pathlib import Path

import jax.numpy as jnp


def load_params(folder=Path(__file__).parent):
    """Returns every tensor under its full name, in the dtype and shape that manifest.json tells."""
    params = {}
    for name, info in json.loads((Path(folder) / "manifest.json").read_bytes())["tensors"].items():
        parts = [jnp.load(Path(folder) / file) for file in info["files"]]
        array = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        is_packed = info["dtype"].startswith(("float4_", "float6_"))  # these stay packed bytes
        if info["dtype"].startswith("float8_"):
            array = array.view(info["dtype"])
        if str(array.dtype) != info["dtype"] and not is_packed:
            raise TypeError(f"{name} is {info['dtype']}: jax.config.update('jax_enable_x64', True) before loading")
        params[name] = array
    return params


if __name__ == "__main__":
    params = load_params()
