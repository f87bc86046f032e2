"""gpt-oss without kernels of our own is lowered for a TPU, without one: by XLA, and as `auto` has it there."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tensorport
from tensorport.models import gpt_oss
from tensorport.models.gpt_oss.names import ExpertLayout, parameter_shapes
from tensorport.text import decoder as loop
from tensorport.text.sampling import Sampling, row_keys

B, SLOTS = 3, 96


def config_of(preset: str, layers: int) -> gpt_oss.Config:
    fields = tensorport.synthesize.__globals__["_config"](preset, {"num_hidden_layers": layers})
    return gpt_oss.Config.from_json(fields)


def lowered(function: Any, *args: Any) -> str:
    """For a TPU; it calls nothing that XLA does not have there, and nothing is computed in float64."""
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    text = str(jitted.trace(*args).lower(lowering_platforms=("tpu",)).as_text())
    called = set(re.findall(r"custom_call @([\w.$]+)", text))
    assert called <= {"mhlo.topk"}, called
    assert "f64" not in text
    return text


@pytest.mark.parametrize("implementation", ["xla", "auto"])
@pytest.mark.parametrize("is_cached", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("tokens", [1, 40], ids=["decode", "prefill"])
@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
@pytest.mark.parametrize(("preset", "layers"), [("tiny", 4), ("gpt-oss-20b", 2)])
def test_a_step_is_lowered_for_a_tpu(  # noqa: PLR0917 - what a step is made of
    preset: str, layers: int, experts: ExpertLayout, tokens: int, is_cached: bool, implementation: Any
) -> None:
    config = config_of(preset, layers)
    params = parameter_shapes(config, "bfloat16", experts)
    cache = jax.eval_shape(partial(gpt_oss.empty_cache, config, B, SLOTS)) if is_cached else None

    def step(params: Any, ids: Any, cache: Any) -> Any:
        return gpt_oss.forward(params, config, ids, cache, implementation=implementation)

    text = lowered(step, params, jax.ShapeDtypeStruct((B, tokens), jnp.int32), cache)
    # Codes arrive as bytes, and no matrix of experts as floats before a loop takes a part of it.
    assert ("ui8" in text) == (experts == "mxfp4")
    assert f"tensor<{B}x{tokens}x{config.vocab_size}xf32>" in text


@pytest.mark.parametrize("experts", ["mxfp4", "dense"])
def test_what_generation_runs_is_lowered_for_a_tpu(experts: ExpertLayout) -> None:
    config = config_of("tiny", 2)
    decoder, params = gpt_oss.GptOss(config), parameter_shapes(config, "bfloat16", experts)
    cache = jax.eval_shape(partial(gpt_oss.empty_cache, config, B, SLOTS))
    place = (None,) * len(jax.tree.leaves(cache))
    settings = jax.eval_shape(
        lambda: loop.Settings(Sampling.of(B, top_k=5, top_p=0.9), row_keys(0, B), jnp.zeros(8, jnp.int32))
    )
    row, done = jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.bool_)
    seen, limit = jax.ShapeDtypeStruct((B, config.vocab_size), jnp.bool_), jax.ShapeDtypeStruct((), jnp.int32)
    lowered(loop.more_tokens, decoder, place, params, cache, seen, row, row, done, limit, settings)
