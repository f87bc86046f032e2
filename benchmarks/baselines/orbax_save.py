"""Saves a checkpoint's parameters by Orbax, for orbax_restore.py.

usage: orbax_save.py SOURCE OUTPUT
"""

import sys
from pathlib import Path

import orbax.checkpoint as ocp
from safetensors.flax import load_file

source, output = (Path(argument).resolve() for argument in sys.argv[1:])
arrays = {}
for file in sorted(source.glob("*.safetensors")):
    arrays.update(load_file(file))
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(output / "params", arrays)
