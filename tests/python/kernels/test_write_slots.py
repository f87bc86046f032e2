"""write_slots: rows into slots of an array, in its memory on CPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mxfp4_cases import random_array
from tensorport import kernels
from tensorport.kernels.write_slots.api import write_slots

B, S, T, G, D = 2, 7, 4, 3, 5  # rows of the batch, slots, tokens, heads, width of a head

SLOTS = jnp.asarray([[6, 0, -1, 3], [7, 2, 2**31 - 1, -(2**31)]], jnp.int32)


def inputs(dtype: Any = jnp.bfloat16) -> tuple[Any, Any, Any]:
    return random_array(B, S, G, D, dtype=dtype, seed=0), random_array(B, T, G, D, dtype=dtype, seed=1), SLOTS


def expected(array: Any, rows: Any, slots: Any) -> Any:
    out = np.array(array)
    for row, token in np.ndindex(*slots.shape):
        if 0 <= slots[row, token] < out.shape[1]:
            out[row, slots[row, token]] = np.asarray(rows)[row, token]
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_in_their_slots_and_the_rest_is_as_it_was(dtype: str) -> None:
    args = inputs(dtype)
    before = np.array(args[0])
    for function in (write_slots, jax.jit(write_slots)):
        found = function(*args)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected(*args))
        np.testing.assert_array_equal(args[0], before)


def test_rows_are_rounded_to_the_dtype_of_the_array() -> None:
    array, _, slots = inputs()
    rows = random_array(B, T, G, D, dtype=jnp.float32, seed=2)
    np.testing.assert_array_equal(write_slots(array, rows, slots), expected(array, rows.astype(jnp.bfloat16), slots))


def test_what_is_needed_later_stays() -> None:
    args = inputs()

    @jax.jit
    def both(array: Any, rows: Any, slots: Any) -> Any:
        written = write_slots(array * 2, rows, slots)
        return written, array, write_slots(written, rows * 3, slots[:, ::-1])

    written, array, again = both(*args)
    np.testing.assert_array_equal(array, args[0])
    np.testing.assert_array_equal(written, expected(args[0] * 2, *args[1:]))
    np.testing.assert_array_equal(again, expected(written, args[1] * 3, SLOTS[:, ::-1]))


def test_vmap_writes_each() -> None:
    args = inputs()
    batch = [jnp.stack([x, jnp.roll(x, 1, axis=1)]) for x in args]
    found = jax.jit(jax.vmap(write_slots))(*batch)
    for index in range(2):
        np.testing.assert_array_equal(found[index], expected(*(x[index] for x in batch)))


def test_gradients_are_those_of_what_is_left_and_what_is_written() -> None:
    array, rows, slots = inputs(jnp.float32)
    direction = random_array(B, S, G, D, dtype=jnp.float32, seed=3)

    def loss(array: Any, rows: Any) -> Any:
        return jnp.sum(write_slots(array, rows, slots) * direction)

    of_array, of_rows = jax.jit(jax.grad(loss, (0, 1)))(array, rows)
    np.testing.assert_array_equal(of_array, expected(direction, jnp.zeros_like(rows), slots))
    for row, token in np.ndindex(B, T):
        slot = int(slots[row, token])
        wanted = direction[row, slot] if 0 <= slot < S else jnp.zeros((G, D))
        np.testing.assert_array_equal(of_rows[row, token], wanted)


@pytest.mark.parametrize("sizes", [(0, S, T), (B, S, 0), (B, 0, T)], ids=str)
def test_empty_arrays(sizes: tuple[int, int, int]) -> None:
    batch, slots, tokens = sizes
    array, rows = jnp.ones((batch, slots, G, D)), jnp.ones((batch, tokens, G, D))
    np.testing.assert_array_equal(write_slots(array, rows, jnp.zeros((batch, tokens), jnp.int32)), array)


def test_wrong_arguments_are_refused_by_name() -> None:
    array, rows, slots = inputs()
    for args, message in [
        ((array[:1], rows, slots), "B, the rows of the batch: found 1 in array, 2 in rows, 2 in slots"),
        ((array, rows, slots[:, :3]), "T, the number of rows: found 4 in rows, 3 in slots"),
        ((array, rows[:, :, :2], slots), "G, the number of heads: found 3 in array, 2 in rows"),
        ((array, rows[..., :4], slots), "D, the size of a head: found 5 in array, 4 in rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_slots(*args)


class TestNative:
    def test_it_is_the_choice_on_cpu(self) -> None:
        explained = kernels.explain(write_slots, *inputs())
        assert (explained.op, explained.implementation) == ("write_slots", "native")
        assert kernels.explain(write_slots, *inputs("float16")).implementation == "xla"

    def test_a_donated_array_keeps_its_memory_and_is_never_converted(self) -> None:
        """Not even within a loop, which is how tokens are generated."""

        def loop(array: Any, rows: Any, slots: Any) -> Any:
            return jax.lax.fori_loop(0, 3, lambda _, array: write_slots(array, rows, slots), array)

        for function in (partial(write_slots, implementation="native"), loop):
            args = inputs()
            compiled = jax.jit(function, donate_argnums=0).lower(*args).compile()
            text = compiled.as_text()
            assert text is not None
            assert not [line for line in text.splitlines() if f"[{B},{S},{G},{D}]" in line and "convert(" in line]
            place = args[0].unsafe_buffer_pointer()
            wanted = expected(*args)
            found = compiled(*args)
            assert found.unsafe_buffer_pointer() == place
            np.testing.assert_array_equal(found, wanted)
