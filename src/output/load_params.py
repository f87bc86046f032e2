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
        if str(array.dtype) != info["dtype"] and array.dtype == jnp.uint8:
            if info["dtype"][:6] not in ("float4", "float6"):  # float4 and float6 stay packed bytes
                array = array.view(info["dtype"])
        params[name] = array
    return params


if __name__ == "__main__":
    params = load_params()
