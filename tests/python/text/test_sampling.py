"""Sampling: filters against a sort in NumPy and against transformers, draws against their distribution."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray
from tensorport.text.sampling import Sampling, filtered_logits, row_keys, sample, token_keys

INF = np.float32(np.inf)
VOCAB_SIZE = 53
ROUNDING = 4 * float(np.finfo(np.float32).eps)
"""A quotient or two in float32."""

Row = NDArray[np.float32]
filtered_jit, sample_jit = jax.jit(filtered_logits), jax.jit(sample)


def random_rows(
    rows: int, seed: int, scale: float = 3.0, vocab_size: int = VOCAB_SIZE
) -> tuple[Row, NDArray[np.bool_]]:
    """Logits, a tenth of them -inf, and which tokens were seen."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (rows, vocab_size)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -INF
    return logits, rng.random(logits.shape) < 0.3


def oracle(  # noqa: PLR0917 - the order of SETTINGS
    logits: Row, seen: NDArray[np.bool_], temperature: float, k: int | None, p: float | None, penalty: float
) -> Row:
    """One row, by sorting; ties with the last one kept are kept."""
    logits = np.where(seen, np.where(logits < 0, logits * np.float32(penalty), logits / np.float32(penalty)), logits)
    if temperature == 0:
        return np.where(np.arange(logits.size) == logits.argmax(), logits, -INF)
    logits = logits / np.float32(temperature)
    if k is not None:
        logits = np.where(logits >= np.sort(logits)[::-1][:k][-1], logits, -INF)
    if p is not None:
        weights = np.exp(logits.astype(np.float64) - logits.max())
        order = np.argsort(-logits, kind="stable")
        mass = np.cumsum(weights[order]) / weights.sum()
        last = order[np.searchsorted(mass, p)] if p < 1 else order[-1]
        logits = np.where(logits >= logits[last], logits, -INF)
    return logits.astype(np.float32)


SETTINGS: list[tuple[float, int | None, float | None, float]] = [
    (1.0, None, None, 1.0),
    (0.7, None, None, 1.0),
    (0.0, 3, 0.2, 1.4),
    (1.0, 1, None, 1.0),
    (1.0, 7, None, 1.0),
    (1.0, 1000, None, 1.0),
    (2.5, None, 0.9, 1.0),
    (0.3, None, 0.3, 1.0),
    (1.0, None, 1.0, 1.0),
    (1.0, None, 1e-30, 1.0),
    (1.0, None, None, 1.3),
    (1.0, None, None, 0.6),
    (1.2, 11, 0.8, 1.2),
    (3.0, 30, 0.95, 0.8),
]
"""temperature, top_k, top_p, repetition_penalty."""


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_filtered_logits_are_those_of_a_sort(settings: tuple[Any, ...], scale: float) -> None:
    temperature, k, p, penalty = settings
    logits, seen = random_rows(17, 1, scale)
    sampling = Sampling.of(17, temperature=temperature, top_k=k, top_p=p, repetition_penalty=penalty)
    found = np.asarray(filtered_jit(logits, sampling, seen))
    expected = np.stack([oracle(row, was, *settings) for row, was in zip(logits, seen, strict=True)])
    assert np.array_equal(found == -INF, expected == -INF)
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def _of_all(settings: list[tuple[float, int | None, float | None, float]]) -> Sampling:
    """Each row with settings of its own; 2**20 and 1 for those that are off."""
    temperatures, ks, ps, penalties = zip(*settings, strict=True)
    return Sampling.of(
        len(settings),
        temperature=temperatures,
        top_k=[k or 2**20 for k in ks],
        top_p=[p or 1.0 for p in ps],
        repetition_penalty=penalties,
    )


def test_rows_of_a_batch_have_settings_of_their_own() -> None:
    logits, seen = random_rows(len(SETTINGS), 2)
    found = np.asarray(filtered_jit(logits, _of_all(SETTINGS), seen))
    for row, settings in enumerate(SETTINGS):
        expected = oracle(logits[row], seen[row], *settings)
        assert np.array_equal(found[row] == -INF, expected == -INF), settings
        np.testing.assert_allclose(found[row], expected, rtol=ROUNDING)


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s[0] > 0])
def test_filtered_logits_are_those_of_transformers(settings: tuple[Any, ...]) -> None:
    try:
        torch = importlib.import_module("torch")
        processors = importlib.import_module("transformers.generation.logits_process")
    except ImportError as fault:
        pytest.skip(f"needs torch and transformers: {fault}")
    temperature, k, p, penalty = settings
    # No two logits of a row are equal, for transformers cuts ties of top_p at random; none is -inf before top_k.
    rng = np.random.default_rng(3)
    logits = np.stack([rng.permutation(VOCAB_SIZE) for _ in range(9)]).astype(np.float32) / 7 - 3
    logits += rng.random(logits.shape).astype(np.float32) / 100
    prompts = rng.integers(0, VOCAB_SIZE, (9, 12))
    seen = np.zeros(logits.shape, np.bool_)
    seen[np.arange(9)[:, None], prompts] = True
    chain = [processors.RepetitionPenaltyLogitsProcessor(penalty), processors.TemperatureLogitsWarper(temperature)]
    chain += [] if k is None else [processors.TopKLogitsWarper(k)]
    chain += [] if p is None else [processors.TopPLogitsWarper(p)]
    expected = torch.from_numpy(logits.copy())
    for processor in chain:
        expected = processor(torch.from_numpy(prompts), expected)
    sampling = Sampling.of(9, temperature=temperature, top_k=k, top_p=p, repetition_penalty=penalty)
    found = np.asarray(filtered_jit(logits, sampling, seen))
    assert np.array_equal(found == -INF, expected.numpy() == -INF)
    np.testing.assert_allclose(found, expected.numpy(), rtol=ROUNDING)


@pytest.mark.parametrize(
    ("logits", "settings", "kept"),
    [
        ([1, 2, 2, 2, 3], {"top_k": 2}, [1, 2, 3, 4]),
        ([0.0, -0.0, 0.0, -1], {"top_k": 1}, [0, 1, 2]),
        ([5, 5, 5, 5, 5], {"top_k": 2}, [0, 1, 2, 3, 4]),
        ([5, 5, 5, 5, 5], {"top_p": 0.5}, [0, 1, 2, 3, 4]),
        ([5, 5, 5, 5, 5], {"top_p": 1e-30}, [0, 1, 2, 3, 4]),
        ([-4, -9, -5], {"top_p": 1e-30}, [0]),
        ([-4, -9, -5], {"top_p": 1e-40}, [0]),
        ([-4, -9, -5], {"top_k": 2}, [0, 2]),
        ([1, -np.inf, 2, -np.inf], {"top_k": 3}, [0, 2]),
        ([1, -np.inf, 2, -np.inf], {"top_p": 0.999999}, [0, 2]),
        ([-np.inf, -np.inf, 7], {"top_k": 2, "top_p": 0.1}, [2]),
        # Of 0.5, 0.25, 0.125, 0.125: what reaches the sum exactly is enough.
        (np.log([0.5, 0.25, 0.125, 0.125]), {"top_p": 0.5}, [0]),
        (np.log([0.5, 0.25, 0.125, 0.125]), {"top_p": 0.7}, [0, 1]),
        (np.log([0.5, 0.25, 0.125, 0.125]), {"top_p": 0.8}, [0, 1, 2, 3]),
        # top_p counts what top_k left: 2/3 and 1/3.
        (np.log([0.5, 0.25, 0.125, 0.12]), {"top_k": 2, "top_p": 0.6}, [0]),
        (np.log([0.5, 0.25, 0.125, 0.12]), {"top_p": 0.6}, [0, 1]),
        ([1, 3, 3, 2], {"temperature": 0.0}, [1]),
        ([1, 3, 3, 2], {"temperature": 2e-38}, [1, 2]),
        ([3e38, 2e38, -3e38], {"temperature": 2e-38}, [0, 1, 2]),
        ([0.0, -1e-3, np.finfo(np.float32).min], {"temperature": 0.5}, [0, 1]),
    ],
)
def test_what_is_kept_at_the_edges(logits: Any, settings: dict[str, Any], kept: list[int]) -> None:
    row = np.array([logits], np.float32)
    found = np.asarray(filtered_jit(row, Sampling.of(1, **settings), np.zeros(row.shape, np.bool_)))[0]
    finite = np.flatnonzero(found > -INF).tolist()
    if settings.get("temperature") == 2e-38:
        # The others are far below, whether they are still finite or not.
        probabilities = np.asarray(jax.nn.softmax(found))
        assert np.isfinite(found.max())
        assert np.flatnonzero(probabilities).tolist() == np.flatnonzero(row[0] == row[0].max()).tolist()
    else:
        assert finite == kept


@pytest.mark.parametrize("settings", [SETTINGS[i] for i in (0, 1, 4, 6, 10, 12)])
def test_draws_have_the_frequencies_of_the_filtered_logits(settings: tuple[Any, ...]) -> None:
    draws, size = 20000, 11
    logits, seen = random_rows(1, 4, 1.5, size)
    temperature, k, p, penalty = settings
    sampling = Sampling.of(draws, temperature=temperature, top_k=k, top_p=p, repetition_penalty=penalty)
    ids, _ = sample_jit(np.tile(logits, (draws, 1)), sampling, np.tile(seen, (draws, 1)), row_keys(7, draws))
    kept = oracle(logits[0], seen[0], *settings).astype(np.float64)
    expected = np.exp(kept - kept.max()) / np.exp(kept - kept.max()).sum() * draws
    counts = np.bincount(np.asarray(ids), minlength=size)
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert counts.size > 1
    assert expected.min() > 5
    statistic = np.sum((counts - expected) ** 2 / expected)
    assert float(jax.scipy.stats.chi2.sf(statistic, counts.size - 1)) > 1e-3


def test_logprobs_are_those_of_the_model_before_any_setting() -> None:
    logits, seen = random_rows(len(SETTINGS), 5)
    logits += np.float32(300)
    ids, logprobs = map(np.asarray, sample_jit(logits, _of_all(SETTINGS), seen, row_keys(0, len(SETTINGS))))
    exact = logits.astype(np.float64)
    shifted = exact - exact.max(axis=1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected[np.arange(len(ids)), ids], rtol=1e-6, atol=1e-6)


def test_greedy_takes_the_first_of_the_greatest_after_the_penalty() -> None:
    logits = np.array([[1, 5, 5, 4], [1, 5, 5, 4], [-1, -2, -3, -1.5]], np.float32)
    seen = np.array([[False] * 4, [False, True, False, False], [True, False, False, False]])
    ids, _ = sample_jit(logits, Sampling.of(3, temperature=0.0, repetition_penalty=2.0), seen, row_keys(0, 3))
    assert np.asarray(ids).tolist() == [1, 2, 3]


def test_cold_draws_are_greedy() -> None:
    logits, seen = random_rows(40, 6)
    for temperature in (1e-4, 1e-20, 1e-38):
        ids, _ = sample_jit(logits, Sampling.of(40, temperature=temperature), seen, row_keys(1, 40))
        assert np.array_equal(ids, logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("settings", [{}, {"top_k": 4, "top_p": 0.8, "repetition_penalty": 1.2}])
def test_rows_that_are_not_finite_give_minus_1_and_leave_the_others_alone(
    temperature: float, settings: dict[str, Any]
) -> None:
    logits, seen = random_rows(6, 7)
    sampling, keys = Sampling.of(6, temperature=temperature, **settings), row_keys(2, 6)
    sound, sound_logprobs = map(np.asarray, sample_jit(logits, sampling, seen, keys))
    logits[1, 30], logits[3, 0], logits[4] = np.nan, INF, -INF
    ids, logprobs = map(np.asarray, sample_jit(logits, sampling, seen, keys))
    assert ids.tolist() == [sound[0], -1, sound[2], -1, -1, sound[5]]
    assert np.isnan(logprobs).tolist() == [False, True, False, True, True, False]
    assert np.array_equal(logprobs[[0, 2, 5]], sound_logprobs[[0, 2, 5]])


def test_the_whole_vocabulary_of_gpt_oss() -> None:
    size = 201088
    logits = np.random.default_rng(8).normal(0, 2, (3, size)).astype(np.float32)
    # As the logits of a model in bfloat16 have them: many ties.
    logits[1] = np.asarray(jnp.asarray(logits[1], jnp.bfloat16).astype(jnp.float32))
    seen = np.zeros(logits.shape, np.bool_)
    settings = [(1.0, 50, 0.9, 1.0), (0.8, 50, None, 1.0), (1.0, None, 0.9, 1.0)]
    found = np.asarray(filtered_jit(logits, _of_all(settings), seen))
    for row, one in enumerate(settings):
        kept = oracle(logits[row], seen[row], *one) > -INF
        # The sum of 201088 terms in float32 may decide otherwise about the last few of 100000 kept ones.
        assert np.sum(kept != (found[row] > -INF)) <= (0 if one[1] else 20), one
    ids, logprobs = map(np.asarray, sample_jit(logits, _of_all(settings), seen, row_keys(3, 3)))
    assert np.isfinite(found[np.arange(3), ids]).all()
    exact = logits.astype(np.float64)
    expected = exact[np.arange(3), ids] - np.log(np.exp(exact).sum(axis=1))
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)


def test_a_draw_hangs_on_the_seed_the_row_and_the_position_alone() -> None:
    logits, seen = random_rows(5, 9)

    def draw(rows: int, seed: int, position: int) -> list[int]:
        keys = token_keys(row_keys(seed, rows), jnp.full(rows, position, jnp.int32))
        return [int(token) for token in sample_jit(logits[:rows], Sampling.of(rows), seen[:rows], keys)[0]]

    draws = {(seed, position): draw(5, seed, position) for seed in range(3) for position in range(3)}
    assert len(set(map(tuple, draws.values()))) == 9
    assert draw(2, 1, 2) == draws[1, 2][:2]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1, impl="threefry2x32"), 4), 2)
    found = token_keys(row_keys(1, 5), jnp.full(5, 2, jnp.int32))[4]
    assert np.array_equal(jax.random.key_data(found), jax.random.key_data(key))


def test_keys_do_not_follow_the_default_generator() -> None:
    expected = jax.random.key_data(row_keys(5, 3))
    with jax.default_prng_impl("rbg"):
        assert np.array_equal(jax.random.key_data(row_keys(5, 3)), expected)


def _primitives(jaxpr: Any, into_branches: bool) -> set[str]:
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        if equation.primitive.name != "cond" or into_branches:
            for part in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")
            ):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    names |= _primitives(inner, into_branches)
    return names


def test_random_numbers_and_bisection_run_only_where_a_row_needs_them() -> None:
    logits, seen = random_rows(2, 10)
    jaxpr = jax.make_jaxpr(sample)(logits, Sampling.of(2), seen, row_keys(0, 2)).jaxpr
    always, ever = _primitives(jaxpr, False), _primitives(jaxpr, True)
    assert "cond" in always
    for name in ("random_bits", "scan"):
        assert name in ever
        assert name not in always
    assert not {"sort", "top_k", "approx_top_k"} & ever


def test_other_settings_are_not_compiled_again() -> None:
    traced: list[int] = []

    @jax.jit
    def counted(logits: Any, sampling: Sampling, seen: Any, keys: Any) -> Any:
        traced.append(1)
        return sample(logits, sampling, seen, keys)

    logits, seen = random_rows(4, 11)
    for settings in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": [0.1, 0.2, 0.3, 1]}, {"repetition_penalty": 2}):
        counted(logits, Sampling.of(4, **settings), seen, row_keys(len(settings), 4))
    assert traced == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature: found -0.1, expected a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": float("inf")}, "temperature: found inf"),
        ({"temperature": 1e39}, r"temperature: found 1e\+39"),
        ({"temperature": [1.0, 1.0]}, r"temperature: found shape \(2,\), expected a number or one for each of 3 rows"),
        ({"temperature": [1.0, -1.0, 1.0]}, "temperature: found"),
        ({"top_k": 0}, "top_k: found 0, expected at least 1"),
        ({"top_k": [1, 2, -3]}, "top_k: found"),
        ({"top_p": 0.0}, "top_p: found 0.0, expected above 0, at most 1"),
        ({"top_p": 1.0000001}, "top_p: found 1.0000001"),
        ({"top_p": float("nan")}, "top_p: found nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: found 0.0, expected a finite number above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty: found -1.0"),
        ({"repetition_penalty": 1e-60}, "repetition_penalty: found 1e-60"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: found nan"),
    ],
)
def test_settings_out_of_their_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling.of(3, **settings)


@pytest.mark.parametrize("top_k", [1.5, True, "3"])
def test_a_top_k_that_is_no_integer_is_refused(top_k: Any) -> None:
    with pytest.raises(TypeError, match="top_k: found"):
        Sampling.of(3, top_k=top_k)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_beyond_32_bits_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed: found {seed}"):
        row_keys(seed, 1)


def test_settings_of_numpy_and_beyond_32_bits_are_taken() -> None:
    settings: dict[str, Any] = {"top_k": [np.int64(7), 2**40], "top_p": np.array([0.5, 1])}
    sampling = Sampling.of(2, temperature=np.float64(0.5), **settings)
    assert sampling.top_k.tolist() == [7, 2**31 - 1]
    assert [leaf.shape for leaf in jax.tree.leaves(sampling)] == [(2,)] * 4
