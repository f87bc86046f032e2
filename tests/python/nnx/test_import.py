"""What `tensorport.nnx` imports, and when."""

import subprocess
import sys

import tensorport


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_it_is_imported_when_it_is_first_used() -> None:
    done = run(
        "import sys, tensorport; before = 'flax' in sys.modules; tensorport.nnx.MXFP4Linear; "
        "print(before, 'flax' in sys.modules)"
    )
    assert done.stdout.strip() == "False True", done.stderr


def test_the_package_lists_what_it_imports_late() -> None:
    assert {"kernels", "mxfp4", "nnx"} <= set(dir(tensorport)) & set(tensorport.__all__)
    assert tensorport.kernels.explain is not None


def test_without_flax_the_import_names_the_extra() -> None:
    done = run("import sys; sys.modules['flax'] = None\nimport tensorport.mxfp4\nimport tensorport.nnx")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: tensorport.nnx needs Flax: pip install 'tensorport[flax]'"


def test_importing_it_starts_no_backend() -> None:
    code = "import tensorport.nnx, jax._src.xla_bridge as b; print(b.backends_are_initialized())"
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
