"""gpt-oss with `native_int8`: its experts multiply activations rounded to int8, and all else is as it was."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorport
from numpy.typing import NDArray
from tensorport.models import gpt_oss


def relative_rms(found: Any, expected: Any) -> NDArray[Any]:
    """For each position."""
    wanted = np.asarray(expected, np.float64)
    square = np.square(np.asarray(found, np.float64) - wanted).mean(-1)
    rms: NDArray[Any] = np.sqrt(square / np.square(wanted).mean(-1))
    return rms


def test_a_model_runs_with_it_and_its_logits_are_near(golden_hf: Path) -> None:
    with np.load(golden_hf / "golden.npz") as arrays:
        ids, expected = arrays["input_ids"], arrays["logits"]
    exact, rounded = (
        tensorport.load_model(golden_hf, dtype="bfloat16", implementation=implementation)
        for implementation in ("native", "native_int8")
    )
    logits = rounded(ids)
    # Of the references transformers itself is in bfloat16 at 0.035 to 0.04. Where a router wavers it may be more.
    assert 0 < np.median(relative_rms(logits, exact(ids))) < 0.04
    assert np.median(relative_rms(logits, expected)) < 0.045
    prompt = ids[:1]
    greedy = np.asarray(rounded.generate(prompt, temperature=0, max_new_tokens=9, ignore_eos=True))
    assert greedy.shape == (1, prompt.shape[1] + 9)
    # Each token is the likeliest behind those before it, up to what chunks of other sizes round.
    after = np.asarray(rounded(greedy[:, :-1]))[0, prompt.shape[1] - 1 :]
    chosen = np.take_along_axis(after, greedy[0, prompt.shape[1] :, None], axis=1)[:, 0]
    assert (after.max(axis=1) - chosen < 0.1).all()


def test_the_experts_of_a_model_are_what_is_rounded(golden_hf: Path) -> None:
    config = gpt_oss.load_config(golden_hf)
    params, _ = gpt_oss.load_model_params(golden_hf, config, dtype="bfloat16")
    tokens = jnp.asarray([[3, 1, 4]])

    def program(implementation: Any) -> str:
        def forward(params: Any) -> Any:
            return gpt_oss.forward(params, config, tokens, implementation=implementation)[0]

        return jax.jit(forward).lower(params).as_text()

    def kernels(implementation: Any) -> set[str]:
        return set(re.findall(r"@tensorport\.v1\.(\w+)\(", program(implementation)))

    assert kernels("native") == {"linear", "attention", "mxfp4_moe"}
    assert kernels("native_int8") == {"linear", "attention", "mxfp4_moe_int8"}
