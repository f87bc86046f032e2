"""One implementation in benchmarks/gpu_model.py, in a process of its own.

usage: python gpu_model_job.py SETTINGS

SETTINGS is a JSON file; a row of JSON is printed for each case as it ends. A case that fails does not end the others,
but after a fault of the device they all fail: so each implementation has a process.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorport
from tensorport.kernels.attention import pallas_triton as attention_triton
from tensorport.kernels.mxfp4_moe import pallas_triton as moe_triton
from tensorport.kernels.registry import Device
from tensorport.models import LanguageModel, gpt_oss
from tensorport.models.gpt_oss.names import parameter_shapes
from tensorport.models.registry import Loaded
from tensorport.mxfp4 import MXFP4Array
from tensorport.synthesize import _config, _huggingface_tensors
from tensorport.text import decoder as text_decoder

sys.path.insert(0, str(Path(__file__).parent))
from gpu_model_rows import Row, Skip, run_cases

# Where two tokens' logits are this near, of the largest, rounding decides: two of bfloat16's.
NEAR_TIE = 2 * 2.0**-8
ROUNDS_S = 8.0  # no other round begins after so long
ROWS_WALKED = 4  # rows that go through the layers at once where they are looked at
CODE_RMS = math.sqrt(np.mean(np.square([0, 0.5, 1, 1.5, 2, 3, 4, 6])))


class Job:
    """What the cases share."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.prompts = json.loads(Path(settings["prompts"]).read_text())
        self.reference = json.loads(Path(settings["reference"]).read_text()) if settings["reference"] else {}
        self.model: Any = None
        self.made: dict[str, Any] = {}
        self.is_warm = False

    def cases(self) -> Iterator[tuple[str, str, Callable[[], Row]]]:
        """Each with its part; one that needs the model is skipped without it."""
        settings, context = self.settings, self.prompts["context"]
        yield "load", "random weights" if settings["random"] else "page cache to device", self.load
        if settings["context"]:
            # A long context before all else, for the device tells the peak of its memory so far.
            yield "context", f"1 row after {len(context)} tokens", functools.partial(self.decode, [context])
        yield "compile", "all other shapes at once", self.compile
        for batch in settings["batches"]:
            rows = self.prompts["decode"][:batch]
            label = f"{batch} row{'s' * (batch > 1)} after {len(rows[0])} tokens"
            yield "decode", label, functools.partial(self.decode, rows)
        for length in settings["prefills"]:
            yield "prefill", f"{length} tokens", functools.partial(self.prefill, length)

    def load(self) -> Row:
        began = time.perf_counter()
        if self.settings["random"]:
            self.model = random_model(Path(self.settings["checkpoint"]), self.settings["implementation"])
        else:
            self.model = tensorport.load_model(
                self.settings["checkpoint"], implementation=self.settings["implementation"]
            )
        jax.block_until_ready(self.model.params)
        seconds = time.perf_counter() - began
        nbytes = sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self.model.params))
        return Row(seconds=seconds, nbytes=nbytes, is_of_read=False, note="made, not loaded" * self.settings["random"])

    def compile(self) -> Row:
        """The first run of every case in a thread of its own: XLA compiles one program on one core."""
        runs = [functools.partial(self._steps, self.prompts["decode"][:batch]) for batch in self.settings["batches"]]
        runs += [functools.partial(self._prompt, length) for length in self.settings["prefills"]]
        self._model()
        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            futures = [pool.submit(run) for run in runs]
            failed = [future for future in futures if future.exception() is not None]
        self.is_warm = True
        # What failed its own case will tell.
        note = f"and the first runs of {len(runs) - len(failed)} of {len(runs)} cases"
        return Row(compile_s=time.perf_counter() - began, note=note)

    def decode(self, prompts: list[list[int]]) -> Row:
        """A step of all rows, greedy; what is measured are all dispatches but the first two, as `stats` has them."""
        batch = len(prompts)
        compile_s, result, rates = self._rounds(
            functools.partial(self._steps, prompts), lambda result: result.stats.tokens_per_s
        )
        peak = peak_bytes()  # before the layers are looked at
        key = f"{batch} after {len(prompts[0])}"
        told, is_wrong = self._compared(key, prompts, result.ids)
        experts = self.made[key]["experts"]
        row = rates_of_rows(rates, batch, compile_s)
        return dataclasses.replace(
            row,
            status="failed" if is_wrong else "measured",
            experts=experts,
            nbytes=self._bytes_of_step(batch, experts),
            peak_bytes=peak,
            note=told,
        )

    def prefill(self, length: int) -> Row:
        compile_s, _, rates = self._rounds(
            functools.partial(self._prompt, length), lambda result: length / result.stats.prefill_s
        )
        row = rates_of_rows(rates, length, compile_s)
        return dataclasses.replace(row, note=f"{min(self.settings['chunk'], length)} at a time")

    def _steps(self, prompts: list[list[int]]) -> Any:
        return self._generate(prompts, self.settings["new"])

    def _prompt(self, length: int) -> Any:
        return self._generate([self.prompts["prefill"][:length]], 1)

    def _generate(self, prompts: list[list[int]], new: int) -> Any:
        return self._model().generate(prompts, max_new_tokens=new, chunk=self.settings["chunk"], **GREEDY)

    def _model(self) -> Any:
        if self.model is None:
            raise Skip("the weights are not there")
        return self.model

    def _rounds(
        self, generate: Callable[[], Any], rate_of: Callable[[Any], float | None]
    ) -> tuple[float | None, Any, list[float]]:
        """What the first run took beside a later one, the last result, and the rates of all but the first."""
        first_s = None if self.is_warm else timed(generate)[0]
        seconds, rates = [], []
        while len(rates) < self.settings["rounds"] and (not rates or sum(seconds) < ROUNDS_S):
            took_s, result = timed(generate)
            rate = rate_of(result)
            if not rate or not math.isfinite(rate):
                raise ValueError(f"tokens per second: found {rate}, expected a number")
            seconds.append(took_s)
            rates.append(rate)
        return None if first_s is None else max(first_s - statistics.median(seconds), 0.0), result, rates

    def _bytes_of_step(self, batch: int, experts: float) -> int:
        """Bytes of weights that a step of all rows reads, where a layer reads so many experts."""
        params, config = self._model().params, self._model().config
        mixtures = [layer["mlp"]["experts"] for layer in params["model"]["layers"].values()]
        of_expert = sum(int(leaf.nbytes) for leaf in jax.tree.leaves(mixtures)) / config.num_local_experts
        row = int(params["model"]["embed_tokens"]["weight"].nbytes) // config.vocab_size
        one = self._model().decoder.bytes_per_token(params, 1)
        return round(one + (experts - config.num_experts_per_tok) * of_expert + (batch - 1) * row)

    def _compared(self, key: str, prompts: list[list[int]], ids: list[list[int]]) -> tuple[str, bool]:
        """How the ids differ from those of XLA, and whether by more than rounding explains."""
        made = {"ids": ids}
        self.made[key] = made
        reference = self.reference.get(key)
        first = {} if reference is None else differences(ids, reference["ids"])
        if reference is not None and not first:
            made["experts"] = reference["experts"]
            return "ids are those of xla", False
        sequences = np.concatenate([np.asarray(prompts), np.asarray(ids)], axis=1)
        at = {row: len(prompts[0]) + step - 1 for row, step in first.items()}
        logits, made["experts"] = self._walk(sequences, at)
        if reference is None:
            return "", False
        gaps = {}
        for row, step in first.items():
            found, wanted = ids[row][step], reference["ids"][row][step]
            gaps[row] = float(abs(logits[row][wanted] - logits[row][found]) / np.abs(logits[row]).max())
        row = min(first, key=lambda row: first[row])
        far = [row for row, gap in gaps.items() if not gap <= NEAR_TIE]
        told = (
            f"ids of {len(ids) - len(first)} of {len(ids)} rows are those of xla; first difference at token "
            f"{first[row]}, where the two logits are {gaps[row]:.1e} of the largest apart"
        )
        verdict = "all near-ties" if not far else f"{len(far)} of {len(first)} are no near-ties"
        return f"{told}; {verdict} (within {NEAR_TIE:.1e})", bool(far)

    def _walk(self, sequences: Any, at: dict[int, int]) -> tuple[dict[int, Any], float]:
        """Logits of rows at some of their positions, and how many experts of a layer a step goes through.

        By XLA and layer by layer, whole sequences at once: only there the choices of the routers can be seen. The steps
        that count are those whose tokens were made.
        """
        model = self._model()
        decoder = dataclasses.replace(model.decoder, implementation="xla")
        logits: dict[int, Any] = {}
        chosen: list[list[Any]] = []
        for start in range(0, len(sequences), ROWS_WALKED):
            block = jnp.asarray(sequences[start : start + ROWS_WALKED], jnp.int32)
            chosen.append([])
            for layer in decoder.layers(model.params, block):
                if layer.experts is not None:
                    chosen[-1].append(np.asarray(layer.experts[:, -self.settings["new"] :]))
            for row in range(start, start + len(block)):
                if row in at:
                    stream = layer.stream[row - start, at[row]][None]
                    logits[row] = np.asarray(decoder.logits(model.params, stream)[0], np.float64)
        choices = np.concatenate([np.stack(block) for block in chosen], axis=1)  # [layers, rows, steps, k]
        of_steps = choices.transpose(0, 2, 1, 3).reshape(choices.shape[0] * choices.shape[2], -1)
        return logits, float(np.mean([len(np.unique(step)) for step in of_steps]))


GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "stats": True}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def rates_of_rows(rates: list[float], tokens: int, compile_s: float | None) -> Row:
    """From tokens per second, a row for so many tokens."""
    median = statistics.median(rates)
    spread = (max(rates) - min(rates)) / median
    return Row(seconds=tokens / median, spread=spread, tokens_per_s=median, compile_s=compile_s)


def differences(found: list[list[int]], wanted: list[list[int]]) -> dict[int, int]:
    """For each row that differs its first token that does."""
    first = {}
    for row, (left, right) in enumerate(zip(found, wanted, strict=True)):
        steps = [step for step, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1]]
        if steps:
            first[row] = steps[0]
    return first


def random_model(folder: Path, implementation: str) -> Any:
    """A model with the distributions of `tensorport.synthesize`, made on the device; the folder has a config.json."""
    config = gpt_oss.load_config(folder)
    fields = json.loads((folder / "config.json").read_text())
    fills = {tensor.name: tensor.fill for tensor in _huggingface_tensors(_config("gpt-oss-20b", fields))}
    paths, structure = jax.tree_util.tree_flatten_with_path(
        parameter_shapes(config, "bfloat16"), is_leaf=lambda leaf: isinstance(leaf, MXFP4Array)
    )
    keys = jax.random.split(jax.random.key(0), len(paths))
    leaves = []
    for (path, shape), key in zip(paths, keys, strict=True):
        name = ".".join(str(part.key) for part in path)
        if isinstance(shape, MXFP4Array):
            std = fills[f"{name}_scales"]["mxfp4_scales"]["std"]
            byte = round(math.log2(std / CODE_RMS)) + 127
            leaves.append(MXFP4Array(*_mxfp4(key, shape.blocks.shape, shape.scales.shape, byte)))
        else:
            normal = fills[name]["normal"]
            leaves.append(_normal(key, shape.shape, normal["mean"], normal["std"]))
    params = jax.tree.unflatten(structure, leaves)
    report: Any = None  # nothing was loaded
    return LanguageModel(Loaded(gpt_oss.GptOss(config, None, implementation), params, report), folder)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mxfp4(key: Any, blocks: tuple[int, ...], scales: tuple[int, ...], byte: Any) -> tuple[Any, Any]:
    return jax.random.bits(key, blocks, jnp.uint8), jnp.full(scales, byte, jnp.uint8)


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Any, shape: tuple[int, ...], mean: Any, std: Any) -> Any:
    return (mean + std * jax.random.normal(key, shape, jnp.bfloat16)).astype(jnp.bfloat16)


def interpret_triton() -> None:
    """Has kernels interpreted, and implementations chosen as on an H200."""
    Device.of = classmethod(lambda *_: Device("gpu", "NVIDIA H200", (9, 0)))  # type: ignore[assignment]
    for module, name in ((attention_triton, "attention"), (moe_triton, "moe")):
        setattr(module, name, functools.partial(getattr(module, name), interpret=True))


def peak_bytes() -> int | None:
    """Of the device so far, or None where it does not tell."""
    statistics_ = jax.devices()[0].memory_stats()
    return statistics_.get("peak_bytes_in_use") if statistics_ else None


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    device = jax.devices()[0]  # starts the backend, which no case is to pay for
    notes = []
    if settings["implementation"] == "pallas_triton" and device.platform != "gpu":
        interpret_triton()
        notes.append("interpreted")
    text_decoder.CAPTURES_LOOP = settings["one_graph"]
    job = Job(settings)
    for row in run_cases(job.cases(), settings):
        note = "; ".join(filter(None, [*notes, row.note])) if row.status == "measured" else row.note
        told = dataclasses.replace(row, peak_bytes=row.peak_bytes or peak_bytes(), note=note)
        print(json.dumps(dataclasses.asdict(told)), flush=True)
    Path(settings["ids"]).write_text(json.dumps(job.made))


if __name__ == "__main__":
    main()
