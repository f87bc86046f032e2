"""gpt-oss on Modal's machines: downloaded to a Volume, converted, run and measured on a GPU of your choice.

    make wheel                     # the wheel that the machines install
    pip install modal && modal setup
    modal run notebooks/modal/tensorport_app.py::download
    modal run notebooks/modal/tensorport_app.py::convert
    modal run notebooks/modal/tensorport_app.py::generate --gpu L40S --prompt 'The capital of France is'
    modal run notebooks/modal/tensorport_app.py::benchmark --gpu H100 --output h100.jsonl

The guide is docs/modal.md. `modal run FILE::JOB --help` lists the flags of a job. The machine that runs `modal` needs
neither tensorport nor JAX. Every job may be started again: what is done is not done twice.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import modal

Gpu = Literal["T4", "L4", "A10G", "L40S", "A100", "A100-80GB", "H100", "H200", "B200"]

GPUS: dict[str, str] = {
    "T4": "T4",
    "L4": "L4",
    "A10G": "A10",
    "L40S": "L40S",
    "A100": "A100",
    "A100-80GB": "A100-80GB",
    "H100": "H100!",
    "H200": "H200",
    "B200": "B200",
}
"""How Modal spells each: https://modal.com/docs/guide/gpu. Its `A100` has 40 GB, or more where that is what is free;
for an `H100` it may give an H200, which would make a benchmark of the wrong GPU: `H100!` is an H100."""

Implementation = Literal["auto", "xla", "pallas_triton", "scaled_dot"]
"""Those of :func:`tensorport.kernels.explain` that are for GPUs."""

MODEL = "openai/gpt-oss-20b"

FOLDER = "/models"
"""Where the Volume is in a container: `hub` in it is Hugging Face's cache, `trees` has what was converted."""

PYTHON = "3.12"
CUDA = os.environ.get("TENSORPORT_CUDA", "cuda13")
CORES = 8
HOUR_S = 3600


def find_wheel() -> Path:
    """The wheel that containers install: the newest for Linux on x86_64 in `dist/`, or the one TENSORPORT_WHEEL names.

    Raises:
        FileNotFoundError: there is none; says how to build one.
    """
    if chosen := os.environ.get("TENSORPORT_WHEEL"):
        if Path(chosen).is_file():
            return Path(chosen)
        raise FileNotFoundError(f"TENSORPORT_WHEEL: found no file {chosen}, expected a wheel")
    dist = Path(__file__).parents[2] / "dist"
    wheels = sorted(dist.glob("tensorport-*linux*_x86_64.whl"), key=lambda wheel: wheel.stat().st_mtime)
    if not wheels:
        raise FileNotFoundError(
            f"{dist}: found no wheel for Linux on x86_64, expected one; `make wheel` in {dist.parent} builds it, or "
            "TENSORPORT_WHEEL names one"
        )
    return wheels[-1]


def image_with(wheel: Path) -> modal.Image:
    """What containers start from: Python, this wheel, and JAX with CUDA."""
    there = f"/wheels/{wheel.name}"
    return (
        modal.Image.debian_slim(python_version=PYTHON)
        .add_local_file(wheel, there, copy=True)
        .pip_install(f"{there}[{CUDA},hub,text]")
        # By default JAX takes three quarters of the GPU's memory, and weights may need more.
        .env({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"})
    )


# A container reads this file too, and has the image already.
image = image_with(find_wheel()) if modal.is_local() else modal.Image.debian_slim(python_version=PYTHON)
volume = modal.Volume.from_name("tensorport-models", create_if_missing=True)
# Empty without HF_TOKEN: gpt-oss needs none.
token = modal.Secret.from_dict({"HF_TOKEN": os.environ.get("HF_TOKEN")})
# Containers have 512 GiB of disk, and the jobs write to the Volume alone, so none asks for more.
app = modal.App("tensorport", image=image, volumes={FOLDER: volume}, secrets=[token])


def use_folder(folder: str) -> None:
    """Lets the caches of Hugging Face and of JAX's compiler be in a folder; before either is imported."""
    os.environ["HF_HUB_CACHE"] = str(Path(folder, "hub"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder, "compiled"))


def commit() -> None:
    """Makes what was written to the Volume last, and seen by later containers. No file of it may be open."""
    if not modal.is_local():
        volume.commit()


def source_of(model: str, folder: str) -> str:
    """What is opened for a model: a folder of this name in the Volume, or else a repository of the hub."""
    uploaded = Path(folder, model)
    return str(uploaded) if uploaded.exists() else model


def tree_of(model: str, folder: str) -> Path:
    """Where the converted tree of a model is."""
    return Path(folder, "trees", model.replace("/", "--"))


@app.function(cpu=CORES, memory=4096, timeout=4 * HOUR_S)
def download_model(model: str = MODEL, folder: str = FOLDER) -> dict[str, Any]:
    """Brings a repository to the Volume, or what of it is not there yet; returns what it has."""
    use_folder(folder)
    import tensorport  # noqa: PLC0415 - in the container alone, as below

    def facts() -> dict[str, Any]:
        checkpoint = tensorport.open(source_of(model, folder), progress=True)
        return {
            "model": model,
            "path": str(checkpoint.path),
            "tensors": len(checkpoint),
            "parameters": checkpoint.total_parameters,
            "nbytes": checkpoint.nbytes,
        }

    found = facts()  # whose files are closed again
    commit()
    return found


@app.function(cpu=CORES, memory=4096, timeout=4 * HOUR_S)
def convert_model(model: str = MODEL, folder: str = FOLDER) -> dict[str, Any]:
    """Writes the verified tree of a model, or what of it is missing; downloads what is not there yet."""
    use_folder(folder)
    import tensorport  # noqa: PLC0415

    tree = tree_of(model, folder)
    # A container sees all cores of its host, and may use those that it asked for.
    report = tensorport.convert(source_of(model, folder), tree, workers=CORES, resume=True)
    print(report)
    commit()
    return {"model": model, "tree": str(tree), "nbytes": report.total_bytes, "verified": report.verified}


def load(model: str, folder: str, implementation: Implementation) -> Any:
    """The model on the GPU, from its tree where there is one; prints what it runs on, and with which kernels."""
    use_folder(folder)
    import jax  # noqa: PLC0415
    import tensorport  # noqa: PLC0415

    tree = tree_of(model, folder)
    source = str(tree) if (tree / "manifest.json").exists() else source_of(model, folder)
    print(f"tensorport {tensorport.__version__}, JAX {jax.__version__} on {jax.devices()[0].device_kind}, {source}")
    loaded = tensorport.load_model(source, implementation=implementation)
    print(loaded.report)
    print(kernels_of(loaded, 1, implementation))
    return loaded


def kernels_of(model: Any, rows: int, implementation: Implementation) -> str:
    """What computes a step of so many rows, and why nothing else does: the experts, which most of the weights are."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    from tensorport import kernels, mxfp4  # noqa: PLC0415

    config, experts = model.config, model.params["model"]["layers"]["0"]["mlp"]["experts"]
    routed = (rows, config.num_experts_per_tok)
    explanation = kernels.explain(
        mxfp4.moe,
        jax.ShapeDtypeStruct((rows, config.hidden_size), jnp.bfloat16),
        jax.ShapeDtypeStruct(routed, jnp.int32),
        jax.ShapeDtypeStruct(routed, jnp.float32),
        *(experts[name] for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")),
        implementation=implementation,
    )
    return str(explanation)


@app.function(cpu=CORES, gpu="L40S", memory=24 * 1024, timeout=HOUR_S)
def generate_text(
    model: str = MODEL,
    *,
    prompt: str = "The capital of France is",
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    implementation: Implementation = "auto",
    folder: str = FOLDER,
) -> str:
    """Continues a prompt; prints the text as it comes, and returns it."""
    loaded = load(model, folder, implementation)
    pieces = []
    for piece in loaded.generate(
        prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stream=True
    ):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


@app.function(cpu=CORES, gpu="L40S", memory=24 * 1024, timeout=HOUR_S)
def measure(
    model: str = MODEL,
    *,
    batches: tuple[int, ...] = (1, 4, 16),
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    implementation: Implementation = "auto",
    folder: str = FOLDER,
) -> list[dict[str, Any]]:
    """Measures random prompts of several batches, greedily; returns a record of each, and prints it as it comes."""
    began = time.perf_counter()
    loaded = load(model, folder, implementation)
    load_s = time.perf_counter() - began
    records = []
    for record in measurements(loaded, batches, prompt_tokens, new_tokens, implementation):
        records.append({"model": model, "load_s": load_s} | record)
        print(json.dumps(records[-1]), flush=True)
    return records


def measurements(
    loaded: Any, batches: tuple[int, ...], prompt_tokens: int, new_tokens: int, implementation: Implementation
) -> Iterator[dict[str, Any]]:
    """A record for each batch: the second of two equal runs, for the first one compiles."""
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    import tensorport  # noqa: PLC0415

    device = jax.devices()[0]
    for batch in batches:
        prompts = np.random.default_rng(batch).integers(0, loaded.config.vocab_size, (batch, prompt_tokens)).tolist()
        for _ in range(2):
            began = time.perf_counter()
            stats = loaded.generate(
                prompts, max_new_tokens=new_tokens, temperature=0, ignore_eos=True, stats=True
            ).stats
            total_s = time.perf_counter() - began
        yield {
            "tensorport": tensorport.__version__,
            "jax": jax.__version__,
            "device": device.device_kind,
            "implementation": implementation,
            "batch": batch,
            "prompt_tokens": stats.prompt_tokens,
            "new_tokens": stats.new_tokens,
            "prefill_s": stats.prefill_s,
            "first_token_s": stats.first_token_s,
            "tokens_per_s": stats.tokens_per_s,
            "total_s": total_s,
            "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        }


def resources(gpu: str, model: str, memory_gib: int | None = None) -> dict[str, Any]:
    """What a container for a model asks of Modal.

    Args:
        gpu: a key of `GPUS`.
        model: a repository's id.
        memory_gib: of the host. By default room for the model's files in the page cache, and 10 GB for JAX: gpt-oss-20b
            has 14 GB of weights, gpt-oss-120b 65 GB.

    Raises:
        ValueError: no such GPU; lists those there are.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu: found {gpu!r}, expected one of {', '.join(GPUS)}")
    memory = 1024 * (memory_gib or (80 if "120b" in model else 24))
    # Cores as well: what is asked for here stands in place of what the function asked for.
    return {"cpu": CORES, "gpu": GPUS[gpu], "memory": memory}


@app.local_entrypoint()
def download(model: str = MODEL) -> None:
    """Brings a repository of the hub to the Volume."""
    print(json.dumps(download_model.remote(model), indent=2))


@app.local_entrypoint()
def convert(model: str = MODEL) -> None:
    """Converts a model in the Volume, or brings it there and converts it meanwhile."""
    print(json.dumps(convert_model.remote(model), indent=2))


@app.local_entrypoint()
def generate(
    *,
    model: str = MODEL,
    gpu: Gpu = "L40S",
    prompt: str = "The capital of France is",
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    implementation: Implementation = "auto",
    memory_gib: int | None = None,
) -> str:
    """Continues a prompt on a GPU; the text is what `modal run --write-result FILE` writes."""
    on_gpu = generate_text.with_options(**resources(gpu, model, memory_gib))
    return on_gpu.remote(
        model,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        implementation=implementation,
    )


@app.local_entrypoint()
def benchmark(
    *,
    model: str = MODEL,
    gpu: Gpu = "L40S",
    batches: str = "1,4,16",
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    implementation: Implementation = "auto",
    memory_gib: int | None = None,
    output: str = "",
) -> None:
    """Measures a model on a GPU; --output is a file of this machine for the records, as JSON lines."""
    sizes = tuple(int(batch) for batch in batches.split(","))
    on_gpu = measure.with_options(**resources(gpu, model, memory_gib))
    records = on_gpu.remote(
        model, batches=sizes, prompt_tokens=prompt_tokens, new_tokens=new_tokens, implementation=implementation
    )
    if output:
        Path(output).write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        print(f"{output}: {len(records)} records")
