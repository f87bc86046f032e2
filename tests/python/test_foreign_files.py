"""Files of arrays that flax, pickle and orbax wrote are checkpoints like any other; nothing in them is executed."""

import collections
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorport

Tree = dict[str, Any]


@pytest.fixture
def tree() -> Tree:
    rng = np.random.default_rng(0)
    return {
        "params": {
            "dense": {"kernel": rng.normal(size=(3, 5)).astype(np.float32), "bias": np.arange(5, dtype=np.float16)},
            "b": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        },
        "scalar": np.asarray(3, np.float64),
        "empty": np.zeros((0, 4), np.int16),
        "flags": np.array([True, False, True]),
        "f8": np.array([1, 2, 448, -0.5], ml_dtypes.float8_e4m3fn),
        "e8": np.array([1, 2, 0.25], ml_dtypes.float8_e8m0fnu),
        "wide": np.array([[2**40, -1]], np.int64),
        "bytes": np.arange(256, dtype=np.uint8).reshape(2, 2, 64),
    }


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", np.asarray(value)


def assert_holds(path: Path, tree: Tree) -> None:
    checkpoint = tensorport.open(path)
    expected = dict(leaves(tree))
    assert set(checkpoint) == set(expected)
    for name, array in expected.items():
        assert checkpoint[name].dtype == array.dtype, name
        assert checkpoint[name].shape == array.shape, name
        assert checkpoint[name].tobytes() == array.tobytes(), name


class TestMsgpack:
    def test_what_flax_wrote_is_read(self, tmp_path: Path, tree: Tree) -> None:
        (tmp_path / "m.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
        assert_holds(tmp_path / "m.msgpack", tree)

    def test_chunks_are_joined(self, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 16)
        (tmp_path / "m.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
        assert_holds(tmp_path / "m.msgpack", tree)
        tensorport.convert(tmp_path / "m.msgpack", tmp_path / "out", format="safetensors", progress=False)
        assert_holds(tmp_path / "out", tree)

    def test_numpy_scalars_are_arrays_without_axes(self, tmp_path: Path) -> None:
        (tmp_path / "m.msgpack").write_bytes(flax.serialization.msgpack_serialize({"a": {"b": np.float32(2.5)}}))
        assert_holds(tmp_path / "m.msgpack", {"a": {"b": np.float32(2.5)}})

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({"step": 3}, ['"step"', "a number"]),
            ({"a": {"b": "text"}}, ['"a.b"', "a text"]),
            ({"a": [np.ones(3)]}, ["a list"]),
            ({"a": None}, ['"a"', "nil"]),
            (np.ones(3), ["without a name"]),
            ({"a": np.ones(3, ml_dtypes.int4)}, ["int4"]),
            ({"a": np.ones(3, np.complex128)}, ["complex128"]),
            ({"a": 1j}, ['"a"', "no array"]),
        ],
    )
    def test_what_is_no_array_is_refused(self, tmp_path: Path, content: Any, words: list[str]) -> None:
        (tmp_path / "m.msgpack").write_bytes(flax.serialization.msgpack_serialize(content))
        assert_refused(tmp_path / "m.msgpack", words)

    def test_every_truncation_is_refused(self, tmp_path: Path, tree: Tree) -> None:
        whole = flax.serialization.msgpack_serialize(tree)
        for length in range(len(whole)):
            (tmp_path / "m.msgpack").write_bytes(whole[:length])
            assert_refused(tmp_path / "m.msgpack", ["m.msgpack"])
        (tmp_path / "m.msgpack").write_bytes(whole + b"\0")
        assert_refused(tmp_path / "m.msgpack", ["1 bytes after the map"])

    def test_deep_maps_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "m.msgpack").write_bytes(b"\x81\xa1a" * 100_000)
        assert_refused(tmp_path / "m.msgpack", ["within each other"])


class TestPickle:
    @pytest.mark.parametrize("protocol", [3, 4, 5])
    def test_what_numpy_pickled_is_read(self, tmp_path: Path, tree: Tree, protocol: int) -> None:
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(tree, protocol=protocol))
        assert_holds(tmp_path / "m.pkl", tree)

    def test_the_slow_pickler_writes_the_same(self, tmp_path: Path, tree: Tree) -> None:
        with (tmp_path / "m.pickle").open("wb") as file:
            pickle._Pickler(file, protocol=4).dump(collections.OrderedDict(tree))
        assert_holds(tmp_path / "m.pickle", tree)

    def test_what_jax_pickled_is_read(self, tmp_path: Path) -> None:
        tree = {"a": jnp.arange(6).reshape(2, 3), "b": {"c": jnp.ones(3, jnp.bfloat16)}}
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(tree))
        assert_holds(tmp_path / "m.pkl", jax.tree.map(np.asarray, tree))

    def test_one_array_under_two_names_is_two_tensors(self, tmp_path: Path) -> None:
        array = np.arange(3)
        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"a": array, "b": {"c": array}}))
        assert_holds(tmp_path / "m.pkl", {"a": array, "b": {"c": array}})

    def test_nothing_is_called(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "made"),)

        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"a": Evil()}))
        assert_refused(tmp_path / "m.pkl", ["mkdir", "not made"])
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({"a": [np.ones(3)]}, ['"a"', "a list"]),
            ({"a": 1.5}, ['"a"', "a float"]),
            ({"a": {"b": None}}, ['"a.b"', "None"]),
            ({"a": np.asfortranarray(np.ones((2, 3)))}, ["Fortran"]),
            ({"a": np.ones(3, ">f4")}, ["lowest byte first"]),
            ({"a": np.ones(3, np.complex128)}, ["c16"]),
            ({"a": np.array(["x"])}, ["U1"]),
            ({"a": np.zeros(3, "V2")}, ["V2"]),
            ({(1, 2): np.ones(3)}, ["no text"]),
            (np.ones(3), ["without a name"]),
        ],
    )
    def test_what_is_no_array_is_refused(self, tmp_path: Path, content: Any, words: list[str]) -> None:
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(content))
        assert_refused(tmp_path / "m.pkl", words)

    def test_old_protocols_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"a": np.ones(3)}, protocol=2))
        assert_refused(tmp_path / "m.pkl", ["protocol 2"])

    def test_every_truncation_is_refused(self, tmp_path: Path, tree: Tree) -> None:
        whole = pickle.dumps(tree)
        for length in range(len(whole)):
            (tmp_path / "m.pkl").write_bytes(whole[:length])
            assert_refused(tmp_path / "m.pkl", ["m.pkl"])

    def test_dicts_that_hold_themselves_and_many_mentions_are_refused(self, tmp_path: Path) -> None:
        loop: Tree = {}
        loop["a"] = loop
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(loop))
        assert_refused(tmp_path / "m.pkl", ["more than 64 dicts within each other"])
        for depth in (20, 60):
            laughs: Tree = {"a": np.ones(1)}
            for _ in range(depth):
                laughs = {"a": laughs, "b": laughs}
            (tmp_path / "m.pkl").write_bytes(pickle.dumps(laughs))
            assert_refused(tmp_path / "m.pkl", ["names beyond all measure"])

    def test_a_dict_may_be_mentioned_some_times(self, tmp_path: Path) -> None:
        shared = {"w": np.arange(3), "v": np.ones((2, 5), np.float32)}
        (tmp_path / "m.pkl").write_bytes(pickle.dumps({"params": shared, "ema": shared, "best": {"params": shared}}))
        names = {f"{prefix}.{name}" for prefix in ("params", "ema", "best.params") for name in shared}
        assert set(tensorport.open(tmp_path / "m.pkl")) == names


@pytest.mark.parametrize("suffix", ["pkl", "msgpack"])
def test_long_names_of_many_arrays_do_not_fill_the_memory(tmp_path: Path, suffix: str) -> None:
    tree = {"k" * 1_000_000: {str(number): np.zeros(1, np.int8) for number in range(300)}}
    dump = pickle.dumps if suffix == "pkl" else flax.serialization.msgpack_serialize
    (tmp_path / f"m.{suffix}").write_bytes(dump(tree))
    assert_refused(tmp_path / f"m.{suffix}", ["names beyond all measure", "the keys of all maps around it"])


class TestOrbax:
    @pytest.fixture
    def saved(self, tmp_path: Path, tree: Tree) -> tuple[Path, Tree]:
        ocp = pytest.importorskip("orbax.checkpoint")
        del tree["empty"], tree["e8"]  # orbax has no arrays without elements, and no float8_e8m0fnu
        tree["layers"] = [np.arange(4, dtype=np.int32), np.ones((2, 3), np.float32)]
        tree["sharded"] = jnp.arange(8, dtype=jnp.bfloat16)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "orbax", tree)
        tree["layers"] = {str(index): array for index, array in enumerate(tree["layers"])}
        return tmp_path / "orbax", tree

    def test_what_orbax_saved_is_read_and_converted(self, tmp_path: Path, saved: tuple[Path, Tree]) -> None:
        path, tree = saved
        with pytest.warns(UserWarning, match="an Orbax checkpoint"):
            assert_holds(path, tree)
        # The copy is there: nothing is told twice.
        tensorport.convert(path, tmp_path / "out", format="orbax", progress=False)
        assert tensorport.verify(tmp_path / "out", path, progress=False).ok
        assert_holds(tmp_path / "out", tree)

    def test_a_group_is_restored_at_a_time(self, saved: tuple[Path, Tree], monkeypatch: pytest.MonkeyPatch) -> None:
        path, tree = saved
        monkeypatch.setattr("tensorport.orbax._GROUP_BYTES", 64)
        with pytest.warns(UserWarning, match="an Orbax checkpoint"):
            assert_holds(path, tree)

    def test_leaves_that_are_no_arrays_are_refused(self, tmp_path: Path) -> None:
        ocp = pytest.importorskip("orbax.checkpoint")
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "orbax", {"a": np.ones(3), "b": {"c": "text"}})
        with pytest.raises(tensorport.CheckpointError, match=r"'b\.c'"):
            tensorport.open(tmp_path / "orbax")

    @pytest.mark.parametrize("damage", ["lost", "truncated", "untyped"])
    def test_a_damaged_checkpoint_is_a_checkpoint_error(self, tmp_path: Path, damage: str) -> None:
        ocp = pytest.importorskip("orbax.checkpoint")
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(tmp_path / "orbax", {"a": {"w": np.ones((3, 5), np.float32)}})
        if damage == "untyped":
            metadata = tmp_path / "orbax" / "_METADATA"
            metadata.write_text(metadata.read_text("utf-8").replace('"value_type"', '"valued_type"'), "utf-8")
        else:
            (chunk,) = (tmp_path / "orbax").rglob("0.0")
            chunk.write_bytes(chunk.read_bytes()[:7])
            if damage == "lost":
                chunk.unlink()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*an Orbax checkpoint")
            assert_refused(tmp_path / "orbax", ["what orbax-checkpoint cannot read"])

    @pytest.mark.skipif(sys.platform == "win32", reason="without such locks")
    def test_copies_of_processes_that_were_killed_go(
        self, tmp_path: Path, saved: tuple[Path, Tree], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, _ = saved
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        program = (
            "import sys, time, tensorport; tensorport.open(sys.argv[1]); print('open', flush=True); time.sleep(60)"
        )
        running, killed = (
            subprocess.Popen([sys.executable, "-W", "ignore", "-c", program, path], stdout=subprocess.PIPE)
            for _ in range(2)
        )
        try:
            for job in (running, killed):
                assert job.stdout is not None
                assert job.stdout.readline() == b"open\n"
            assert len(list((tmp_path / "temporary").glob("tensorport-orbax-*"))) == 2
            killed.kill()
            killed.wait()
            program = "import sys, tensorport; tensorport.open(sys.argv[1])"
            subprocess.run([sys.executable, "-W", "ignore", "-c", program, path], check=True)
            # That of the process that lives is left.
            assert len(list((tmp_path / "temporary").glob("tensorport-orbax-*"))) == 1
        finally:
            for job in (running, killed):
                job.kill()
                job.communicate()


def test_a_folder_with_such_a_file_alone_names_it(tmp_path: Path, tree: Tree) -> None:
    (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree["params"]))
    assert_refused(tmp_path, ["without *.safetensors files, but with flax_model.msgpack"])


def test_keys_that_make_one_name_are_told(tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"a.b": np.ones(3), "a": {"b": np.ones(2)}}))
    assert_refused(tmp_path / "m.pkl", ['"a.b"', "the name twice"])


STORED = Path(__file__).parents[1] / "data" / "foreign"


@pytest.mark.filterwarnings("ignore:.*an Orbax checkpoint")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("flax.msgpack", 6),
        ("protocol3.pkl", 6),
        ("protocol4.pkl", 6),
        ("protocol5.pkl", 6),
        ("jax.pkl", 2),
        ("model.safetensors", 5),
        ("orbax", 6),
        ("orbax_plain", 6),
    ],
)
def test_files_that_earlier_versions_wrote_are_read(name: str, count: int) -> None:
    """Made by tests/data/make_foreign_files.py; tests/data/README.md says by which versions."""
    found = tensorport.open(STORED / name)
    assert len(found) == count
    with np.load(STORED / "expected.npz") as expected:
        for tensor, array in found.items():
            assert array.tobytes() == expected[tensor].tobytes(), tensor
    shapes = {"dense.kernel": (3, 5), "dense.bias": (5,), "embedding": (7, 2), "table": (6,), "counts": (4,)}
    assert {tensor: array.shape for tensor, array in found.items()} == {
        tensor: shape for tensor, shape in (shapes | {"mask": (2, 1)}).items() if tensor in found
    }


def assert_refused(path: Path, words: list[str]) -> None:
    with pytest.raises(tensorport.CheckpointError) as caught:
        tensorport.open(path)
    for word in words:
        assert word in str(caught.value), str(caught.value)
