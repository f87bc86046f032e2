"""What XLA captures of a token of gpt-oss in CUDA graphs, on a machine that has no GPU.

usage: python tools/captured_graph.py [--layers 2] [--batch 1]... [--implementation NAME]... [--keep FOLDER]

Compiles at full width for an H200: `forward` of one token of each row with a cache, the loop of tokens that `generate`
dispatches, and a chunk of 512 tokens of a prompt; with XLA's default options, and with those of
tensorport.text.decoder.ONE_GRAPH. Prints a Markdown table: kernels, how many of them are in command buffers, how many
command buffers that are, and how often the host decides in between, at loops and branches. All are counted once where
they stand, also in the body of a loop.

Needs the environment that gpu_compiler.py names, and tensorport's dependencies in it; tensorport itself is taken from
this checkout, and needs no wheel. --keep leaves the lists of thunks in a folder.
"""

# ruff: noqa: E402 - gpu_compiler stands beside this file, and sets the environment before anything imports jax

import argparse
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "python"), str(ROOT / "benchmarks")]
from gpu_compiler import array, compile_for_gpu  # isort: skip

import jax
import jax.numpy as jnp
from gpu_ceiling import count_captured
from tensorport.kernels.registry import Device, ImplementationName
from tensorport.models import gpt_oss
from tensorport.models.gpt_oss.names import parameter_shapes
from tensorport.synthesize import _config
from tensorport.text import decoder as text_decoder
from tensorport.text.sampling import Sampling, row_keys

OPTIONS: dict[str, dict[str, Any]] = {"default": {}, "ONE_GRAPH": text_decoder.ONE_GRAPH}
CACHE, CHUNK = 4096, 512  # tokens


def programs(config: gpt_oss.Config, implementation: Any, batch: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each with its arguments, the static ones first."""
    decoder = gpt_oss.GptOss(config, None, implementation)
    params = parameter_shapes(config, "bfloat16")
    cache = jax.eval_shape(partial(gpt_oss.empty_cache, config, batch, CACHE))
    place = (None,) * len(jax.tree.leaves(cache))
    settings = jax.eval_shape(
        lambda: text_decoder.Settings(Sampling.of(batch, temperature=0), row_keys(0, batch), jnp.zeros(8, jnp.int32))
    )
    ids, number, flags = (jax.ShapeDtypeStruct((batch,), dtype) for dtype in ("int32", "int32", "bool"))
    seen = jax.ShapeDtypeStruct((batch, config.vocab_size), "bool")

    @partial(jax.jit, donate_argnums=2)
    def one_token(params: Any, tokens: Any, cache: Any) -> Any:
        return gpt_oss.forward(params, config, tokens, cache, implementation=implementation)

    chunk = (jax.ShapeDtypeStruct((batch, CHUNK), "int32"),) * 2
    limit = jax.ShapeDtypeStruct((), "int32")
    return {
        "one token": (one_token, (params, jax.ShapeDtypeStruct((batch, 1), "int32"), cache)),
        "loop of tokens": (
            text_decoder.more_tokens,
            (decoder, place, params, cache, seen, ids, number, flags, limit, settings),
        ),
        f"{CHUNK} tokens of a prompt": (
            text_decoder._prefill_chunk,
            (decoder, place, params, cache, *chunk, number),
        ),
    }


def on_gpu(argument: Any) -> Any:
    """Arrays on the GPU; what is static stays."""
    leaves, structure = jax.tree.flatten(argument)
    return jax.tree.unflatten(
        structure,
        [array(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf for leaf in leaves],
    )


def thunks_of(program: Any, arguments: tuple[Any, ...], options: dict[str, Any], keep: Path | None) -> str:
    """Compiles; returns the list of thunks as XLA runs them."""
    with tempfile.TemporaryDirectory(prefix="tensorport-graph-") as folder:
        compile_for_gpu(program, *map(on_gpu, arguments), xla_dump_to=folder, xla_dump_hlo_as_text=True, **options)
        # The second is written only where something was captured.
        found = [file for end in ("", "_after_thunk_passes") for file in Path(folder).glob(f"*thunk_sequence{end}.txt")]
        if not found:
            raise RuntimeError("XLA's dump: found no list of thunks")
        text = found[-1].read_text()
    if keep is not None:
        keep.write_text(text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--implementation", action="append", choices=get_args(ImplementationName))
    parser.add_argument("--keep", type=Path, help="a folder for lists of thunks")
    options = parser.parse_args()
    # Tracing asks the default device, of which this machine has none.
    Device.of = classmethod(lambda *_: Device("gpu", "NVIDIA H200", (9, 0)))  # type: ignore[assignment]
    config = gpt_oss.Config.from_json(_config("gpt-oss-20b", {"num_hidden_layers": options.layers}))
    print(f"gpt-oss-20b of {options.layers} layers for an H200, jax {jax.__version__}, a cache of {CACHE} tokens\n")
    print(
        "| program | rows | implementation | options | kernels | captured | command buffers | host decides | compile |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for implementation in options.implementation or ["xla", "pallas_triton"]:
        for batch in options.batch or [1]:
            for name, (program, arguments) in programs(config, implementation, batch).items():
                for label, xla in OPTIONS.items():
                    file = "-".join([implementation, str(batch), *name.split(), label])
                    keep = options.keep and options.keep / f"{file}.txt"
                    began = time.perf_counter()
                    thunks = thunks_of(program, arguments, xla, keep)
                    found, seconds = count_captured(thunks), time.perf_counter() - began
                    print(
                        f"| {name} | {batch} | `{implementation}` | {label} | {found.kernels} | {found.kernels_inside} "
                        f"| {found.graphs} | {found.loops_outside + found.branches_outside} | {seconds:.0f} s |",
                        flush=True,
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
