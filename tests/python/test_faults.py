"""Full disks, sources that change, permissions, limits: what is raised, and what resume makes of it."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorport

if sys.platform != "linux":
    pytest.skip("limits and mounts as Linux has them", allow_module_level=True)

Options = dict[str, Any]
Write = Callable[..., Path]

# Small shards: each tensor has a shard of its own, and the largest is split.
SMALL: Options = {"shard_size": 20e-6, "workers": 1, "progress": False}
CAST: Options = {**SMALL, "precision": "bfloat16", "workers": 2}
VARIANTS = pytest.mark.parametrize("options", [SMALL, CAST], ids=["source", "cast"])

# An unprivileged user that nobody is.
STRANGER = 54_321


@pytest.fixture(autouse=True)
def _no_panic(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "panicked" not in capfd.readouterr().err


@pytest.fixture
def source(tmp_path: Path, write_safetensors: Write) -> Path:
    """Two files of 60 kB, six tensors and a tokenizer."""
    return write_source(tmp_path / "source", write_safetensors)


def write_source(folder: Path, write_safetensors: Write) -> Path:
    folder.mkdir()
    random = np.random.default_rng(7)
    for number in range(2):
        tensors = {
            f"layer.{number}.weight": random.standard_normal((70, 100), np.float32),
            f"layer.{number}.codes": random.integers(0, 256, (40, 500), np.uint8),
            f"layer.{number}.bias": random.standard_normal((37,), np.float32),
        }
        write_safetensors(folder / f"model-{number}.safetensors", tensors)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}' + " " * 9000)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def undisturbed(source: Path, options: Options) -> dict[str, bytes]:
    """What a conversion leaves that nothing disturbs."""
    with tempfile.TemporaryDirectory() as folder:
        tensorport.convert(source, Path(folder) / "whole", **options)
        return files(Path(folder) / "whole")


def assert_resumes(source: Path, output: Path, options: Options) -> None:
    """Resuming leaves what an undisturbed conversion leaves."""
    tensorport.convert(source, output, **{**options, "resume": True})
    assert files(output) == undisturbed(source, options)


def run(program: str, *arguments: object, prefix: Sequence[str] = ()) -> Any:
    """Runs a Python program that prints JSON; the time limit turns a hang into a failure."""
    command = [*prefix, sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "panicked" not in done.stderr
    return json.loads(done.stdout)


# Beginning of the programs below. `attempt` says how a call failed: class, errno, filename; None after success.
ATTEMPT = """
import json, os, resource, shutil, subprocess, sys
from pathlib import Path
import tensorport

def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

def attempt(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except OSError as fault:
        return [type(fault).__name__, fault.errno, str(fault.filename)]
    except tensorport.TensorportError as fault:
        return [type(fault).__name__, 0, str(fault)]
"""

# A disk of its own, which the end of the program unmounts.
PRIVATE_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]
DISK = """
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=True)

def limit(options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)

def make_room():
    limit("size=50m,nr_inodes=10000")
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a program that runs below PRIVATE_MOUNTS can mount a small disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = [*PRIVATE_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare, of util-linux")
    if tried.returncode:
        pytest.skip(f"needs a mount namespace of its own: {tried.stderr.strip()}")
    return folder


# Arguments: disk, source, options, limits. Prints how converting and resuming went for each limit of the disk.
FULL_DISK = f"""{ATTEMPT}{DISK}
source, options, limits = Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
tensorport.convert(source, disk / "whole", **options)
whole, outcomes, output = files(disk / "whole"), [], disk / "out"
shutil.rmtree(disk / "whole")
(disk / "other").write_bytes(bytes(4096))
for options_of_disk in limits:
    limit(options_of_disk)
    fault = attempt(tensorport.convert, source, output, **options)
    left = files(output) if output.exists() else {{}}
    finals = [name for name in left if not name.endswith(".tmp") and name != "journal.jsonl"]
    torn = [name for name in finals if left[name] != whole[name]]
    make_room()
    resumed = attempt(tensorport.convert, source, output, resume=True, **options)
    outcomes.append([fault, torn, resumed, files(output) == whole])
    shutil.rmtree(output)
print(json.dumps(outcomes))
"""


def assert_full(outcomes: list[Any], disk: Path) -> set[str]:
    """Every conversion ran out of room or succeeded, and all resumed; returns the names of the files that were hit."""
    hit = set()
    for fault, torn, resumed, is_whole in outcomes:
        assert (torn, resumed, is_whole) == ([], None, True)
        if fault is not None:
            assert fault[:2] == ["OSError", errno.ENOSPC]
            hit.add(str(Path(fault[2]).relative_to(disk)))
    assert outcomes[0][0] is not None
    assert outcomes[-1][0] is None
    return hit


@VARIANTS
def test_a_disk_full_at_any_page_names_the_file_and_the_conversion_resumes(
    source: Path, disk: Path, options: Options
) -> None:
    nbytes = sum(map(len, undisturbed(source, options).values()))
    # Every file begins a page; the other file on the disk takes one.
    limits = [f"size={number * 4096}" for number in range(1, nbytes // 4096 + 30)]
    outcomes = run(FULL_DISK, disk, source, json.dumps(options), json.dumps(limits), prefix=PRIVATE_MOUNTS)
    hit = assert_full(outcomes, disk)
    assert {"out/journal.jsonl", "out/tokenizer.json.tmp", "out/manifest.json.tmp"} < hit, hit
    assert sum(name.endswith(".npy.tmp") for name in hit) > 3, hit


def test_a_disk_without_room_for_names_names_the_file_and_the_conversion_resumes(source: Path, disk: Path) -> None:
    # The disk has two names already: its own folder and the other file.
    limits = [f"nr_inodes={2 + number}" for number in range(1, len(undisturbed(source, SMALL)) + 12)]
    outcomes = run(FULL_DISK, disk, source, json.dumps(SMALL), json.dumps(limits), prefix=PRIVATE_MOUNTS)
    hit = assert_full(outcomes, disk)
    assert {"out/journal.jsonl.tmp", "out/shard_000", "out/tokenizer.json.tmp", "out/manifest.json.tmp"} < hit, hit


# Arguments: disk, source, options of a first tree and of the one that replaces it. Prints, for each number of free
# pages: how replacing went, whether the first tree is as it was, how resuming went, and whether it left the second.
FULL_DISK_OVERWRITE = f"""{ATTEMPT}{DISK}
source, first, second = Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
tensorport.convert(source, disk / "second", **second)
whole, outcomes, output = files(disk / "second"), [], disk / "out"
shutil.rmtree(disk / "second")
for free_pages in range(100):
    tensorport.convert(source, output, **first)
    before = files(output)
    used_pages = sum(-(-len(content) // 4096) for content in before.values())
    limit(f"size={{(used_pages + free_pages) * 4096}}")
    fault = attempt(tensorport.convert, source, output, overwrite=True, **second)
    is_untouched = files(output) == before
    make_room()
    resumed = None if is_untouched else attempt(tensorport.convert, source, output, resume=True, **second)
    outcomes.append([fault, is_untouched, resumed, files(output) == whole])
    shutil.rmtree(output)
    if fault is None:
        break
print(json.dumps(outcomes))
"""


def test_a_disk_full_while_a_tree_is_replaced_leaves_the_first_tree_or_a_resumable_one(
    source: Path, disk: Path
) -> None:
    # The second tree is the larger one.
    outcomes = run(FULL_DISK_OVERWRITE, disk, source, json.dumps(CAST), json.dumps(SMALL), prefix=PRIVATE_MOUNTS)
    for fault, is_untouched, resumed, is_whole in outcomes[:-1]:
        assert fault[:2] == ["OSError", errno.ENOSPC]
        assert (is_untouched, resumed, is_whole) in [(True, None, False), (False, None, True)]
    assert outcomes[0][1]
    assert [outcomes[-1][0], *outcomes[-1][2:]] == [None, None, True]
    assert len({fault[2] for fault, *_ in outcomes[:-1]}) > 3


# Arguments: disk. Prints how writing a random checkpoint went on disks of so many pages, what each left, and whether it
# went well with room.
FULL_DISK_SYNTHESIZE = f"""{ATTEMPT}{DISK}
options = {{"preset": "tiny", "num_hidden_layers": 1, "vocab_size": 600, "num_local_experts": 3, "progress": False}}
whole, outcomes, output = files(tensorport.synthesize(disk / "whole", **options)), [], disk / "out"
shutil.rmtree(disk / "whole")
(disk / "other").write_bytes(bytes(4096))
enough = sum(map(len, whole.values())) // 4096 + 10
for number in (*range(1, 10), *range(10, enough, 23), enough):
    limit(f"size={{number * 4096}}")
    fault = attempt(tensorport.synthesize, output, **options)
    left = [] if fault is None else sorted(files(output))
    make_room()
    again = None if fault is None else attempt(tensorport.synthesize, output, **options)
    outcomes.append([fault, left, again, files(output) == whole])
    shutil.rmtree(output)
print(json.dumps(outcomes))
"""


def test_a_full_disk_ends_synthesize_and_leaves_nothing_in_the_way(disk: Path) -> None:
    outcomes = run(FULL_DISK_SYNTHESIZE, disk, prefix=PRIVATE_MOUNTS)
    beside = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert assert_full(outcomes, disk) == {f"out/{name}" for name in ["model.safetensors.tmp", *beside]}


# Arguments: disk, source, options.
READ_ONLY_DISK = f"""{ATTEMPT}{DISK}
source, options = Path(sys.argv[2]), json.loads(sys.argv[3])
tensorport.convert(source, disk / "whole", **options)
whole = files(disk / "whole")
limit("ro")
outcomes = [
    attempt(tensorport.convert, source, disk / "new", **options),
    attempt(tensorport.convert, source, disk / "whole", overwrite=True, **options),
    attempt(tensorport.convert, source, disk / "whole", resume=True, **options),
    attempt(tensorport.synthesize, disk / "new", "tiny", progress=False),
]
print(json.dumps([outcomes, tensorport.verify(disk / "whole", source, progress=False).ok, files(disk) == {{
    f"whole/{{name}}": content for name, content in whole.items()
}}]))
"""


def test_a_read_only_disk_is_read_and_not_written(source: Path, disk: Path) -> None:
    outcomes, is_ok, is_untouched = run(READ_ONLY_DISK, disk, source, json.dumps(SMALL), prefix=PRIVATE_MOUNTS)
    new, temporary = str(disk / "new"), str(disk / "whole" / "journal.jsonl.tmp")
    refused: list[Any] = [["OSError", errno.EROFS, name] for name in (new, temporary, new)]
    assert outcomes == [*refused[:2], None, refused[2]]
    assert (is_ok, is_untouched) == (True, True)


class Change:
    """A progress callback that does something once, when all tensors are written and none is verified yet."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action, self.was_done = action, False

    def __call__(self, event: tensorport.ProgressEvent) -> None:
        if not self.was_done and (event.phase, event.tensors_done) == ("convert", event.tensors_total):
            self.action()
            self.was_done = True


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def edit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-2000, os.SEEK_END)
        file.write(bytes(1000))


def replace(path: Path) -> None:
    content = path.read_bytes()
    path.with_suffix(".new").write_bytes(content[:-2000] + bytes(2000))
    path.with_suffix(".new").rename(path)


# What becomes of a source file, and how a conversion that reads it fails.
CHANGES: dict[str, tuple[Callable[[Path], None], type[Exception]]] = {
    "truncated": (truncate, tensorport.CheckpointError),
    "emptied": (lambda path: os.truncate(path, 0), tensorport.CheckpointError),
    "edited": (edit, tensorport.CheckpointError),
    "replaced": (replace, tensorport.CheckpointError),
    "deleted": (Path.unlink, FileNotFoundError),
}


@contextlib.contextmanager
def restored(path: Path) -> Iterator[None]:
    content, stat = path.read_bytes(), path.stat()
    yield
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_file_that_changes_after_it_was_read_is_named_and_its_return_resumes(
    source: Path, tmp_path: Path, change: str
) -> None:
    (action, expected), path = CHANGES[change], source / "model-0.safetensors"
    moment = Change(lambda: action(path))
    with restored(path):
        with pytest.raises(expected) as fault:
            tensorport.convert(source, tmp_path / "out", **{**SMALL, "progress": moment})
        assert str(path) in str(fault.value)
        if isinstance(fault.value, OSError):
            assert (fault.value.errno, fault.value.filename) == (errno.ENOENT, str(path))
        assert not (tmp_path / "out" / "manifest.json").exists()
    assert_resumes(source, tmp_path / "out", SMALL)


# Arguments: source, output, options.
CONVERT = f"""{ATTEMPT}
print(json.dumps(attempt(tensorport.convert, sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))))
"""


@contextlib.contextmanager
def stopped(source: Path, output: Path, options: Options, tensors: int) -> Iterator[list[Any]]:
    """Stops a conversion in a process of its own once it has written so many tensors, and goes on with it afterwards.

    The list holds in the end how it failed, if it did.
    """
    command = [sys.executable, "-c", CONVERT, str(source), str(output), json.dumps(options)]
    outcome: list[Any] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        journal = output / "journal.jsonl"
        while child.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > tensors):
            time.sleep(0.0002)
        child.send_signal(signal.SIGSTOP)
        # The signal stops the last of the threads a little later.
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        try:
            yield outcome
        finally:
            child.send_signal(signal.SIGCONT)
            stdout, stderr = child.communicate(timeout=60)
        assert "panicked" not in stderr
        outcome.append(json.loads(stdout))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, write_safetensors: Write) -> Path:
    """Two files of 70 tensors each."""
    folder = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(8)
    for number in range(2):
        tensors = {f"{number}.{i:02}": random.standard_normal((50, 90), np.float32) for i in range(70)}
        write_safetensors(folder / f"model-{number}.safetensors", tensors)
    return folder


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("number", [0, 1], ids=["which is being read", "which is read later"])
def test_a_source_file_that_changes_under_way_is_named_and_its_return_resumes(
    many: Path, tmp_path: Path, change: str, number: int
) -> None:
    (action, expected), path = CHANGES[change], many / f"model-{number}.safetensors"
    with restored(path):
        with stopped(many, tmp_path / "out", SMALL, tensors=20) as outcome:
            action(path)
        ((name, _, message),) = outcome
        assert name == expected.__name__
        assert str(path) in message
    assert_resumes(many, tmp_path / "out", SMALL)


def test_a_file_beside_the_tensors_that_vanishes_is_named_and_its_return_resumes(source: Path, tmp_path: Path) -> None:
    path = source / "tokenizer.json"
    content = path.read_bytes()
    with pytest.raises(FileNotFoundError) as fault:
        tensorport.convert(source, tmp_path / "out", **{**SMALL, "progress": Change(path.unlink)})
    assert fault.value.filename == str(path)
    path.write_bytes(content)
    assert_resumes(source, tmp_path / "out", SMALL)


@pytest.mark.parametrize("change", CHANGES)
def test_a_written_file_that_changes_before_it_is_verified_fails_and_resumes(
    source: Path, tmp_path: Path, change: str
) -> None:
    output = tmp_path / "out"
    moment = Change(lambda: CHANGES[change][0](output / "shard_001" / "layer_0_weight.part001.npy"))
    with pytest.raises(tensorport.VerificationError, match=r"layer_0_weight\.part001\.npy") as fault:
        tensorport.convert(source, output, **{**SMALL, "progress": moment})
    assert [failure.tensor for failure in fault.value.report.failures] == ["layer.0.weight"]
    for leftover in output.glob("shard_*/*.new"):
        leftover.unlink()
    assert_resumes(source, output, SMALL)


def test_a_source_that_shrinks_while_it_is_compared_is_an_error_and_no_verdict(source: Path, tmp_path: Path) -> None:
    tree, path = tmp_path / "tree", source / "model-1.safetensors"
    tensorport.convert(source, tree, **SMALL)
    os.truncate(path, 500)
    with pytest.raises(tensorport.CheckpointError, match=r"model-1\.safetensors"):
        tensorport.verify(tree, source, progress=False)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that a stranger can reach and write to; pytest keeps its own to one user."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Permissions bind this process too, root or not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(STRANGER)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def without(path: Path, bits: int) -> Iterator[None]:
    mode = path.stat().st_mode
    path.chmod(mode & ~bits)
    try:
        yield
    finally:
        path.chmod(mode)


def assert_denied(path: Path, source: Path, output: Path, options: Options) -> None:
    with pytest.raises(PermissionError) as fault:
        tensorport.convert(source, output, **options)
    assert (fault.value.errno, fault.value.filename) == (errno.EACCES, str(path))


@pytest.mark.parametrize("name", ["model-1.safetensors", "."])
def test_a_source_that_may_not_be_read_is_named_and_nothing_is_written(
    shared: Path, write_safetensors: Write, name: str
) -> None:
    with unprivileged():
        source = write_source(shared / "source", write_safetensors)
        with without(source / name, 0o444):
            assert_denied(source / name, source, shared / "out", SMALL)
        assert not (shared / "out").exists()
        tensorport.convert(source, shared / "out", **SMALL)


def test_a_file_beside_the_tensors_that_may_not_be_read_is_named_and_the_conversion_resumes(
    shared: Path, write_safetensors: Write
) -> None:
    with unprivileged():
        source = write_source(shared / "source", write_safetensors)
        with without(source / "tokenizer.json", 0o444):
            assert_denied(source / "tokenizer.json", source, shared / "out", SMALL)
        assert_resumes(source, shared / "out", SMALL)


def test_a_folder_that_may_not_be_written_is_named_and_left_alone(shared: Path, write_safetensors: Write) -> None:
    with unprivileged():
        source = write_source(shared / "source", write_safetensors)
        parent, output = shared / "parent", shared / "parent" / "out"
        parent.mkdir()
        with without(parent, 0o222):
            assert_denied(output, source, output, SMALL)
        output.mkdir()
        with without(output, 0o222):
            assert_denied(output / "journal.jsonl.tmp", source, output, SMALL)
        assert not files(parent)
        tensorport.convert(source, output, **SMALL)
        before = files(output)
        with without(output, 0o222):
            assert_denied(output / "journal.jsonl.tmp", source, output, {**CAST, "overwrite": True})
        assert files(output) == before


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_a_shard_folder_that_may_not_be_written_is_named_and_resumes(
    shared: Path, write_safetensors: Write, mode: str
) -> None:
    output, shard = shared / "out", shared / "out" / "shard_003"
    with unprivileged():
        source = write_source(shared / "source", write_safetensors)
        if mode == "overwrite":
            tensorport.convert(source, output, **CAST)
        else:
            with without(source / "tokenizer.json", 0o444), pytest.raises(PermissionError):
                tensorport.convert(source, output, **SMALL)
            # One of its files has to be written again.
            next(shard.iterdir()).write_bytes(b"")
        with without(shard, 0o222), pytest.raises(PermissionError) as fault:
            tensorport.convert(source, output, **{**SMALL, mode: True})
        assert fault.value.errno == errno.EACCES
        assert Path(fault.value.filename).parent == shard
        assert_resumes(source, output, SMALL)


def test_what_may_not_be_read_of_a_tree_is_in_the_report(shared: Path, write_safetensors: Write) -> None:
    tree = shared / "tree"
    with unprivileged():
        source = write_source(shared / "source", write_safetensors)
        tensorport.convert(source, tree, **SMALL)
        for name in ("manifest.json", "tokenizer.json", "shard_002/layer_0_codes.npy"):
            with without(tree / name, 0o444):
                report = tensorport.verify(tree, progress=False)
            (failure,) = report.failures
            assert failure.file == name
            assert "Permission denied" in failure.what
        with without(tree, 0o444), pytest.raises(PermissionError) as fault:
            tensorport.verify(tree, progress=False)
        assert fault.value.filename == str(tree)
        assert tensorport.verify(tree, progress=False).ok


# Beginning of programs that allow themselves only so many open files more.
FEW_FILES = f"""{ATTEMPT}
hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
# The last one lists the others, and is closed by now.
used = max(map(int, os.listdir("/proc/self/fd")))

def attempt_with(more, function, *arguments, **options):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard_limit))
    try:
        return attempt(function, *arguments, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
"""

# Arguments: source, folder for the outputs, options. Prints how converting went, and how resuming with more files.
FEW_FILES_CONVERT = f"""{FEW_FILES}
source, folder, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
outcomes = []
for more in range(30):
    output = folder / str(more)
    fault = attempt_with(more, tensorport.convert, source, output, **options)
    if fault is not None and (output / "journal.jsonl").exists():
        # Half way to enough: resuming may fail as well, but loses nothing.
        again = attempt_with(more + 1, tensorport.convert, source, output, resume=True, **options)
        assert again is None or again[1] == fault[1], again
    outcomes.append([fault, attempt(tensorport.convert, source, output, resume=True, **options)])
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_too_few_open_files_name_a_file_and_the_conversion_resumes(source: Path, tmp_path: Path, workers: int) -> None:
    options = {**SMALL, "workers": workers}
    outcomes = run(FEW_FILES_CONVERT, source, tmp_path, json.dumps(options))
    whole = undisturbed(source, options)
    for more, (fault, resumed) in enumerate(outcomes):
        assert resumed is None
        assert files(tmp_path / str(more)) == whole
        if fault is not None:
            assert fault[:2] == ["OSError", errno.EMFILE]
            assert Path(fault[2]).is_relative_to(tmp_path)
    assert outcomes[0][0] is not None
    assert outcomes[-1][0] is None


# Arguments: a folder of many files, a tree. Prints how opening the one and verifying the other went.
FEW_FILES_READ = f"""{FEW_FILES}
def verify(tree):
    report = tensorport.verify(tree, workers=4, progress=False)
    assert report.ok, report

many, tree = Path(sys.argv[1]), Path(sys.argv[2])
opened = [attempt_with(more, lambda: dict(tensorport.open(many))) for more in range(8)]
print(json.dumps([opened, [attempt_with(more, verify, tree) for more in range(30)]]))
"""


def test_too_few_open_files_say_nothing_about_a_tree(source: Path, tmp_path: Path, write_safetensors: Write) -> None:
    many, tree = tmp_path / "many", tmp_path / "tree"
    many.mkdir()
    for number in range(100):
        write_safetensors(many / f"{number}.safetensors", {f"{number}": np.zeros(3)})
    tensorport.convert(source, tree, **SMALL)
    opened, verified = run(FEW_FILES_READ, many, tree)
    for outcomes, folder in ((opened, many), (verified, tree)):
        faults = [fault for fault in outcomes if fault is not None]
        assert {(name, number) for name, number, _ in faults} == {("OSError", errno.EMFILE)}
        assert all(Path(filename).is_relative_to(folder) for *_, filename in faults)
    # A hundred files are not open at once.
    assert opened[-1] is None
    assert verified[-1] is None


# Arguments: source, output, options, a user without processes. Prints how converting went for each number of threads.
FEW_THREADS = f"""{ATTEMPT}
source, output, options, user = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
os.setgid(user)
os.setuid(user)
threads, outcomes = len(os.listdir("/proc/self/task")), []
hard_limit = resource.getrlimit(resource.RLIMIT_NPROC)[1]
for more in range(options["workers"] + 1):
    resource.setrlimit(resource.RLIMIT_NPROC, (threads + more, hard_limit))
    fault = attempt(tensorport.convert, source, output / str(more), **options)
    resource.setrlimit(resource.RLIMIT_NPROC, (hard_limit, hard_limit))
    outcomes.append([fault, attempt(tensorport.convert, source, output / str(more), resume=True, **options)])
print(json.dumps(outcomes))
"""


def test_a_worker_that_cannot_be_started_is_an_os_error_and_the_conversion_resumes(
    shared: Path, write_safetensors: Write
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become a user without other processes")
    source = write_source(shared / "source", write_safetensors)
    options = {**SMALL, "workers": 5}
    outcomes = run(FEW_THREADS, source, shared, json.dumps(options), STRANGER)
    whole = undisturbed(source, options)
    assert outcomes[-1] == [None, None]
    for more, (fault, resumed) in enumerate(outcomes[:-1]):
        assert fault == ["BlockingIOError", errno.EAGAIN, "a worker thread"]
        assert resumed is None
        assert files(shared / str(more)) == whole
