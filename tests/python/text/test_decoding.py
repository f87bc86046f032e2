"""The loop that decodes, with a toy model whose next token hangs on everything before it."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tensorport.text import decoder as device
from tensorport.text import decoding
from tensorport.text.decoding import Decoding, Step, decode
from tensorport.text.sampling import Sampling, row_keys, sample, token_keys
from toy_decoder import NO_TOKEN, TRACES, VOCAB_SIZE, ToyDecoder, greedy, log_softmax, toy_params, true_logits

PROMPTS = [[3, 1, 4, 1, 5], [9], [(7 * i + 2) % VOCAB_SIZE for i in range(23)]]
"""Shorter and longer than a chunk of 4, one of a single token."""

sample_jit = jax.jit(sample)


def start(prompts: Any = PROMPTS, max_new_tokens: int = 12, name: str = "toy", **settings: Any) -> Decoding:
    params = settings.pop("params", toy_params())
    settings = {"vocab_size": VOCAB_SIZE, "chunk": 4, **settings}
    return decode(ToyDecoder(name), params, prompts, max_new_tokens=max_new_tokens, **settings)


def joined(steps: Any) -> tuple[list[list[int]], list[list[float]]]:
    """The ids and logprobs of all steps, row by row."""
    steps = list(steps)
    rows = range(len(steps[0].ids))
    return (
        [[token for step in steps for token in step.ids[row]] for row in rows],
        [[logprob for step in steps for logprob in step.logprobs[row]] for row in rows],
    )


def test_greedy_tokens_are_those_of_a_plain_loop() -> None:
    ids, logprobs = joined(start(max_new_tokens=150, temperature=0))
    assert ids == [greedy(prompt, 150) for prompt in PROMPTS]
    for prompt, row, row_logprobs in zip(PROMPTS, ids, logprobs, strict=True):
        expected = [log_softmax(true_logits(prompt + row[:n]))[token] for n, token in enumerate(row)]
        np.testing.assert_allclose(row_logprobs, expected, rtol=0, atol=1e-5)


def test_the_penalty_counts_tokens_of_the_prompt_and_new_ones() -> None:
    ids, _ = joined(start(max_new_tokens=30, temperature=0, repetition_penalty=1.3))
    assert ids == [greedy(prompt, 30, penalty=1.3) for prompt in PROMPTS]
    assert ids != [greedy(prompt, 30) for prompt in PROMPTS]


@pytest.mark.parametrize("row", range(3))
def test_a_row_of_a_ragged_batch_is_the_row_alone(row: int) -> None:
    together, logprobs = joined(start(temperature=0))
    alone, logprobs_alone = joined(start([PROMPTS[row]], temperature=0))
    assert (alone, logprobs_alone) == ([together[row]], [logprobs[row]])


def test_a_drawn_row_does_not_depend_on_the_others() -> None:
    settings: dict[str, Any] = {"max_new_tokens": 40, "top_p": 0.95, "seed": 3}
    ids, logprobs = joined(start(**settings))
    others = [[8, 8, 8], PROMPTS[1], [2] * 9]
    others_ids, others_logprobs = joined(start(others, **settings, stop_tokens=[ids[0][3]]))
    ended = len(others_ids[1])
    assert others_ids[1] == ids[1][:ended]
    assert others_logprobs[1] == logprobs[1][:ended]
    assert others_ids[0] != ids[0][: len(others_ids[0])]


@pytest.mark.parametrize("tokens_per_dispatch", [1, 3, 64, None])
def test_results_do_not_depend_on_the_tokens_of_a_dispatch(tokens_per_dispatch: int | None) -> None:
    drawn: dict[str, Any] = {"max_new_tokens": 100, "top_k": 20, "temperature": 1.3, "repetition_penalty": 1.1}
    assert joined(start(**drawn, tokens_per_dispatch=tokens_per_dispatch)) == joined(
        start(**drawn, tokens_per_dispatch=7)
    )


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_results_do_not_depend_on_the_chunks_of_the_prompt(chunk: int) -> None:
    assert joined(start(chunk=chunk)) == joined(start())


def test_a_seed_gives_the_same_tokens_again_and_another_one_others() -> None:
    first = joined(start(seed=1))
    assert first == joined(start(seed=1))
    assert first[0] != joined(start(seed=2))[0]


def test_each_draw_has_the_key_of_its_row_and_position() -> None:
    settings: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2}
    ids, _ = joined(start(seed=6, **settings))
    for row, (prompt, new) in enumerate(zip(PROMPTS, ids, strict=True)):
        for n, token in enumerate(new):
            context = prompt + new[:n]
            seen = np.isin(np.arange(VOCAB_SIZE), context)
            keys = token_keys(row_keys(6, 3)[row : row + 1], jnp.array([len(context)], jnp.int32))
            logits = jnp.asarray(true_logits(context))[None]
            drawn, _ = sample_jit(logits, Sampling.of(1, **settings), jnp.asarray(seen)[None], keys)
            assert int(drawn[0]) == token


def test_rows_with_the_same_prompt_are_drawn_apart() -> None:
    ids, _ = joined(start([PROMPTS[0]] * 2))
    assert ids[0] != ids[1]


def test_each_row_has_settings_of_its_own() -> None:
    ids, _ = joined(start(temperature=[0, 1.5, 0], top_k=[5, 2**40, 7]))
    assert [ids[0], ids[2]] == [greedy(PROMPTS[0], 12), greedy(PROMPTS[2], 12)]
    assert ids[1] != greedy(PROMPTS[1], 12)


def test_tokens_have_the_frequencies_of_the_model() -> None:
    """Chi-square of the first and of the second token, whose distribution follows by summing over the first."""
    rows, temperature = 4000, 1.7
    ids, logprobs = joined(start([[6, 2]] * rows, 2, temperature=temperature, seed=11))
    first = np.exp(log_softmax(true_logits([6, 2]) / temperature))
    after = [np.exp(log_softmax(true_logits([6, 2, token]) / temperature)) for token in range(VOCAB_SIZE)]
    second = np.sum([p * row for p, row in zip(first, after, strict=True)], axis=0)
    for place, probabilities in enumerate((first, second)):
        counts = np.bincount([row[place] for row in ids], minlength=VOCAB_SIZE)
        statistic = np.sum((counts - rows * probabilities) ** 2 / (rows * probabilities))
        assert float(jax.scipy.stats.chi2.sf(statistic, VOCAB_SIZE - 1)) > 1e-3
        assert rows * probabilities.min() > 1
    # By the model's own logits, not by what the temperature made of them.
    expected = log_softmax(true_logits([6, 2]))[[row[0] for row in ids]]
    np.testing.assert_allclose([row[0] for row in logprobs], expected, rtol=0, atol=1e-5)


def test_a_row_ends_with_its_first_stop_token_and_the_others_go_on() -> None:
    full = [greedy(prompt, 60) for prompt in PROMPTS]
    stops = [full[0][9], full[2][30]]
    expected = [row[: min([row.index(stop) for stop in stops if stop in row], default=59) + 1] for row in full]
    assert len({len(row) for row in expected}) == 3
    for tokens_per_dispatch in (1, 5, 64):
        decoding = start(
            max_new_tokens=60, temperature=0, stop_tokens=set(stops), tokens_per_dispatch=tokens_per_dispatch
        )
        assert joined(decoding)[0] == expected
        assert decoding.stats.new_tokens == sum(map(len, expected))


def test_the_loop_ends_when_all_rows_have() -> None:
    stops = {greedy(prompt, 3)[2] for prompt in PROMPTS}
    steps = list(start(max_new_tokens=64, temperature=0, stop_tokens=stops, tokens_per_dispatch=1))
    assert len(steps) <= 3
    assert all(any(step.ids) for step in steps)


def test_a_row_that_the_caller_stops_makes_no_more() -> None:
    decoding = start(max_new_tokens=20, temperature=0, tokens_per_dispatch=4)
    steps = [next(decoding), next(decoding)]
    decoding.stop(2)
    steps += decoding
    full = [greedy(prompt, 20) for prompt in PROMPTS]
    assert joined(steps)[0] == [full[0], full[1], full[2][:5]]


def test_a_row_stopped_before_the_start_makes_none() -> None:
    decoding = start(temperature=0)
    decoding.stop(0)
    assert joined(decoding)[0] == [[], greedy(PROMPTS[1], 12), greedy(PROMPTS[2], 12)]


def test_stopping_all_rows_ends_the_iterator() -> None:
    decoding = start()
    next(decoding)
    for row in range(3):
        decoding.stop(row)
    assert list(decoding) == []


def _after_prefill(done: list[bool]) -> tuple[Any, ...]:
    """The arguments of `more_tokens` behind the prompts, as the loop gives them; some rows are done."""
    prompts = [np.array(prompt, np.int32) for prompt in PROMPTS]
    model, params, batch = ToyDecoder(), toy_params(), len(prompts)
    x, cache = device.prefill(model, params, prompts, device.new_cache(model, params, batch, 41), chunk=4)
    settings = device.Settings(Sampling.of(batch, temperature=0.0), row_keys(0, batch), jnp.full(8, -2, jnp.int32))
    lengths = jnp.array([prompt.size for prompt in prompts], jnp.int32)
    seen, place = jnp.zeros((batch, VOCAB_SIZE), bool), device.placement(cache)
    made, seen = device.first_token(model, params, seen, x, lengths, jnp.array(done), settings)
    return model, place, params, cache, seen, made.ids[:, 0], lengths, made.done, jnp.int32(6), settings


def test_rows_that_are_done_write_nothing_to_the_cache() -> None:
    made, cache, _ = device.more_tokens(*_after_prefill([False, True, False]))
    tokens = np.asarray(cache["tokens"])
    assert (tokens != NO_TOKEN).sum(axis=1).tolist() == [5 + 6, 1, 23 + 6]
    assert not np.asarray(cache["broken"]).any()
    assert np.asarray(made.counts).tolist() == [6, 0, 6]
    assert tokens[1, 0] == PROMPTS[1][0]


def test_the_cache_is_donated_and_changed_in_place() -> None:
    arguments = _after_prefill([False] * 3)
    cache, seen = arguments[3], arguments[4]
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((cache, seen)))
    analysis = device.more_tokens.lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    assert analysis.alias_size_in_bytes >= nbytes
    device.more_tokens(*arguments)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((cache, seen)))


@dataclass(frozen=True)
class WeightedDecoder(ToyDecoder):
    """With one large matrix in bfloat16, times what the toy makes of each token, summed in float32."""

    def hidden(self, params: Any, tokens: Any, cache: Any, positions: Any) -> Any:
        x, cache = super().hidden(params, tokens, cache, positions)
        matrix = params["matrix"].astype(jnp.float32)
        rows = jnp.sum(matrix[None, None] * jnp.tile(x, matrix.shape[1] // 4)[:, :, None], axis=-1)
        return x + 0 * rows[..., :4], cache


def test_the_loop_keeps_no_second_copy_of_the_weights() -> None:
    _, place, params, *rest = _after_prefill([False] * 3)
    matrix = jnp.ones((1000, 1024), jnp.bfloat16)
    arguments = (WeightedDecoder(), place, params | {"matrix": matrix}, *rest)
    analysis = device.more_tokens.lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < matrix.nbytes / 10


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """Grows with each computation that XLA compiles."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:  # noqa: ARG001 - the signature of JAX
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("committed", [False, True])
def test_other_settings_compile_nothing(committed: bool, compiled: list[str]) -> None:
    name = f"settings, committed: {committed}"
    params = jax.device_put(toy_params(), jax.devices()[0]) if committed else toy_params()
    list(start(max_new_tokens=40, name=name, params=params))
    # Chunks of 4 and one of 3 padded to it: hidden for prompts, hidden for tokens.
    assert TRACES[name, "hidden"] == 2
    assert compiled
    compiled.clear()
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"top_k": 3, "top_p": 0.5, "repetition_penalty": 1.5, "seed": 9},
        {"temperature": [0.1, 0.2, 0.3], "stop_tokens": [1, 2, 3]},
        {"max_new_tokens": 100, "tokens_per_dispatch": 64},
        {"prompts": [[1], [2, 3], [4] * 17]},
    ]
    for changed in settings:
        list(start(**{"max_new_tokens": 40, "name": name, "params": params, **changed}))
    assert compiled == []
    assert TRACES[name, "hidden"] == 2


def test_a_committed_prompt_of_many_chunks_is_compiled_once(compiled: list[str]) -> None:
    params = jax.device_put(toy_params(), jax.devices()[0])
    model, prompts = ToyDecoder("chunks"), [np.arange(30, dtype=np.int32), np.arange(6, dtype=np.int32)]

    def run(length: int) -> int:
        cache = device.new_cache(model, params, 2, 83)
        compiled.clear()
        device.prefill(model, params, [ids[:length] for ids in prompts], cache, chunk=5)
        return len(compiled)

    run(5)
    # The chunk is compiled; what keeps the last token of a shorter row comes with the second chunk.
    assert run(30) == 1


def test_a_cache_on_a_mesh_stays_where_the_model_put_it(compiled: list[str]) -> None:
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    model = ShardedDecoder("mesh", NamedSharding(mesh, P(None, "devices")))
    params = jax.device_put(toy_params(), NamedSharding(mesh, P()))
    prompts = [np.array(prompt, np.int32) for prompt in PROMPTS]
    cache = device.new_cache(model, params, 3, 48)
    # What the model left to the loop is on the mesh as well.
    assert cache["broken"].sharding == NamedSharding(mesh, P())
    device.prefill(model, params, [ids[:4] for ids in prompts], cache, chunk=4)
    compiled.clear()
    _, cache = device.prefill(model, params, prompts, device.new_cache(model, params, 3, 48), chunk=4)
    assert len(compiled) <= 1  # What keeps the last token of shorter rows.
    assert cache["tokens"].sharding == model.sharding

    settings: dict[str, Any] = {"max_new_tokens": 12, "max_length": 48, "chunk": 4, "seed": 2, "top_k": 9}
    running = decode(model, params, PROMPTS, vocab_size=VOCAB_SIZE, tokens_per_dispatch=1, **settings)
    steps = [next(running), next(running)]
    compiled.clear()
    # What a dispatch returns does not make the next one compile.
    steps += running
    assert compiled == []
    (ids, logprobs), (expected_ids, expected_logprobs) = joined(steps), joined(start(**settings))
    assert ids == expected_ids
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=0, atol=1e-5)


@dataclass(frozen=True)
class ShardedDecoder(ToyDecoder):
    """Spreads slots of the cache and logits over the devices, but would return the cache elsewhere if it could."""

    sharding: NamedSharding | None = None

    def empty_cache(self, params: Any, batch: int, max_length: int) -> Any:
        cache = super().empty_cache(params, batch, max_length)
        return cache | {"tokens": jax.device_put(cache["tokens"], self.sharding)}

    def hidden(self, params: Any, tokens: Any, cache: Any, positions: Any) -> Any:
        x, cache = super().hidden(params, tokens, cache, positions)
        assert self.sharding is not None
        everywhere = NamedSharding(self.sharding.mesh, P())
        return x, cache | {"tokens": jax.lax.with_sharding_constraint(cache["tokens"], everywhere)}

    def logits(self, params: Any, x: Any) -> Any:
        assert self.sharding is not None
        parts = NamedSharding(self.sharding.mesh, P(None, "devices"))
        return jax.lax.with_sharding_constraint(super().logits(params, x), parts)


def test_no_new_tokens_are_no_steps_and_no_computation() -> None:
    decoding = start(max_new_tokens=0, name="nothing")
    assert list(decoding) == []
    assert TRACES["nothing", "hidden"] == 0
    assert (decoding.stats.prompt_tokens, decoding.stats.new_tokens, decoding.cache_length) == (29, 0, 0)


def test_one_new_token_needs_no_loop() -> None:
    assert joined(start(max_new_tokens=1, temperature=0, name="one"))[0] == [greedy(prompt, 1) for prompt in PROMPTS]
    assert TRACES["one", "logits"] == 1


@pytest.mark.parametrize(
    ("needed", "room"), [(2, 128), (128, 128), (129, 192), (192, 192), (193, 256), (257, 384), (1000, 1000)]
)
def test_caches_come_in_few_lengths_within_the_model(needed: int, room: int) -> None:
    assert start([[1], [2]], needed - 1, max_positions=1000).cache_length == room


def test_a_length_of_the_cache_can_be_given() -> None:
    decoding = start(max_length=35, temperature=0)
    assert decoding.cache_length == 35
    assert joined(decoding)[0] == [greedy(prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "prompts: found none"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: found no tokens, expected at least one"),
        ({"prompts": [[1], [2, 40]]}, r"prompts\[1\]: found token 40, expected 0 .. 39"),
        ({"prompts": [[-1]]}, r"prompts\[0\]: found token -1, expected 0 .. 39"),
        ({"prompts": [[2**40]]}, r"prompts\[0\]: found token 1099511627776"),
        ({"prompts": [[[1]]]}, r"prompts\[0\]: found 2 axes"),
        ({"prompts": [1, 2]}, r"prompts\[0\]: found 0 axes"),
        ({"stop_tokens": [40]}, "stop_tokens: found token 40"),
        ({"max_new_tokens": -1}, "max_new_tokens: found -1, expected at least 0"),
        ({"chunk": 0}, "chunk: found 0, expected at least 1"),
        ({"tokens_per_dispatch": 65}, r"tokens_per_dispatch: found 65, expected 1 \.\. 64"),
        ({"max_positions": 34}, "max_positions: found 34, expected at least 35: 23 tokens of a prompt and 12 new ones"),
        ({"max_length": 34}, "max_length: found 34, expected at least 35"),
        ({"max_length": 50, "max_positions": 40}, "max_length: found 50, expected at most 40"),
        ({"seed": -1}, "seed: found -1"),
        ({"temperature": [0.5, 1.0]}, r"temperature: found shape \(2,\), expected a number or one for each of 3 rows"),
        ({"top_p": 0.0}, "top_p: found 0.0"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_the_first_step(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(**settings)


@pytest.mark.parametrize("name", ["max_new_tokens", "max_length", "chunk", "tokens_per_dispatch", "seed"])
@pytest.mark.parametrize("value", [1.5, True, "2"])
def test_settings_that_are_no_integers_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: found {value!r}, expected an integer"):
        start(**{name: value})


def test_small_integers_of_numpy_do_not_overflow() -> None:
    number: Any = np.uint8(200)
    assert start([[1] * 100], number).cache_length == 384


@pytest.mark.parametrize("prompts", [[[1.0]], ["text"], [[True]]])
def test_prompts_of_anything_but_integers_are_refused(prompts: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"prompts\[0\]"):
        start(prompts)


def test_a_vocabulary_of_another_size_is_named() -> None:
    with pytest.raises(ValueError, match="vocab_size: found 43, expected 40"):
        next(start(vocab_size=43))


@pytest.mark.parametrize("tokens_per_dispatch", [1, 4, 64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_nan_raise_after_the_tokens_before_them(tokens_per_dispatch: int, temperature: float) -> None:
    settings: dict[str, Any] = {"temperature": temperature, "tokens_per_dispatch": tokens_per_dispatch}
    running = start(PROMPTS[:2], params=toy_params(nan_at=9), **settings)
    steps: list[Step] = []
    with pytest.raises(FloatingPointError, match="row 0, position 10: found NaN or infinity in the logits"):
        steps.extend(running)  # Keeps what came before the error.
    sound, _ = joined(start(PROMPTS[:2], **settings))
    ids, _ = joined(steps)
    # The logits behind positions 4 to 8 of row 0 are sound.
    assert ids[0] == sound[0][:5]
    assert ids[1] == sound[1][: len(ids[1])]
    assert list(running) == []


def test_stats_count_tokens_and_leave_out_dispatches_that_may_compile() -> None:
    decoding = start(max_new_tokens=14, tokens_per_dispatch=4)
    assert [len(step.ids[0]) for step in decoding] == [1, 4, 4, 4, 1]
    stats = decoding.stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_tokens) == (29, 3 * 14, 3 * 9)
    assert stats.first_token_s is not None
    assert 0 < stats.prefill_s < stats.first_token_s
    assert stats.decode_tokens_per_s == stats.decode_tokens / stats.decode_s


def test_a_rate_is_not_told_from_dispatches_that_may_compile() -> None:
    decoding = start(max_new_tokens=2)
    list(decoding)
    assert decoding.stats.decode_tokens_per_s is None


@pytest.mark.parametrize(
    ("tick_s", "sizes"),
    [
        (0.01, [1, 1, 2, 4, 8, 16, 32, 64, 64, 8]),
        (0.06, [1] * 12),
    ],
)
def test_dispatches_grow_while_they_are_short(tick_s: float, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by one tick whenever it is read."""
    ticks = iter(range(1000))
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * tick_s))
    assert [len(step.ids[0]) for step in start([[1]], sum(sizes))] == sizes


def test_dispatches_shrink_where_they_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    # Start, prefill, first token; then begin and end of each dispatch.
    times = iter([0, 0, 0, *(t for took in [0.01, 0.02, 0.04, 0.07, 0.2, 0.12, 0.01, 0.01] for t in (0, took))])
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert [len(step.ids[0]) for step in start([[1]], 34)] == [1, 1, 2, 4, 8, 8, 4, 2, 4]
