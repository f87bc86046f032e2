"""validate(): one check after the other, and a report."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from numpy.typing import NDArray

from tensorport.checkpoint import Checkpoint
from tensorport.convert import verify
from tensorport.errors import CheckpointError, MappingError
from tensorport.models.language_model import LanguageModel, load_model, read_config
from tensorport.models.registry import architecture_of
from tensorport.progress import Progress
from tensorport.source import local_path
from tensorport.validation.comparison import Comparison
from tensorport.validation.memory import choose_dtype, host_available_bytes
from tensorport.validation.references import Golden, read_golden, transformers_logits
from tensorport.validation.report import LayerActivations, ValidationCheck, ValidationReport
from tensorport.validation.running import activations, cached_stream, logits_of
from tensorport.validation.tensors import count_values

__all__ = ["validate"]


def validate(
    model: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    source: str | os.PathLike[str] | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    max_tokens: int = 160,
    seed: int = 0,
    progress: Progress = False,
) -> ValidationReport:
    """Checks a model: its tensors, what it computes, and what others compute of it.

    1. config and tensors: every parameter that config.json asks for is there once, with its shape and a dtype that
       fits, and there are no others.
    2. values: no NaN and no infinity in any tensor, MXFP4 scales (255 is NaN) included.
    3. activations: finite behind every layer on a prompt, and how large, and which share of the experts is in use.
    4. cache: the same logits with a cache, filled in chunks and token by token.
    5. reference: the same logits as transformers or a file has, within 1e-4 standard deviations in float32; in bfloat16
       a relative RMS of at most 0.06 at the median position. From a file also the stream behind each layer, and in
       float32 the greedy continuation, where they are stored.
    6. source: `tensorport.verify` of a converted tree.

    The model is in memory once, its activations one layer at a time.

    Args:
        model: what :func:`tensorport.load_model` loads.
        reference: `transformers` (which has to be installed, with torch, and decodes all experts), or an npz file with
            `input_ids` [B, T], `logits` [B, T, V] and perhaps `hidden_0`, `hidden_1` and so on [B, T, H] and
            `greedy_ids` [T + N].
        source: the checkpoint that `model` was converted from; also what transformers then reads.
        dtype: of the computation; by default float32 if half of the memory has room for the model in it, else bfloat16.
        max_tokens: length of the prompt of random ids; more than the sliding window, to be of use. With a file, the
            prompt is the file's.
        seed: of the prompt.
        progress: False, True for bars, or a callable that gets a :class:`ProgressEvent`.

    Returns:
        A report whose `ok` is True when nothing is wrong, and whose `failures` say what is.

    Raises:
        CheckpointError: no checkpoint, no config.json, or one of a model that there is not.
        ImportError: transformers or torch is not installed.
        OSError: the system refused.
        ValueError: an argument is out of its range, or the file does not fit the model.
    """
    begin = time.perf_counter()
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype: found {dtype!r}, expected 'float32' or 'bfloat16'")
    if max_tokens < 2:
        raise ValueError(f"max_tokens: found {max_tokens}, expected at least 2")
    golden = None if reference is None or reference == "transformers" else read_golden(reference)
    model = local_path(model, progress, name="model")
    source = None if source is None else local_path(source, progress)
    checkpoint = Checkpoint(model)
    run = _Run(model, dtype or choose_dtype(checkpoint))
    fits = run.tensors_fit()
    run.values(checkpoint)
    tokens = (1, max_tokens) if golden is None else golden.input_ids.shape
    # Products of float32 are those of float32 on every device, too.
    precise = jax.default_matmul_precision("highest") if run.dtype == "float32" else contextlib.nullcontext()
    if not fits:
        run.skip("the tensors do not fit the configuration", reference)
    else:
        with precise:
            loaded = load_model(model, dtype=run.dtype, progress=progress)
            ids = _prompt(loaded, max_tokens, seed) if golden is None else golden.input_ids
            _check_golden(loaded, golden, str(reference))
            x = run.activations(loaded, ids, golden)
            if x is None:
                run.skip("activations are not finite", reference, has_activations=True)
            else:
                run.cache(loaded, ids, x)
                if golden is not None:
                    run.logits(loaded, f"logits of {Path(str(reference)).name}", x, golden.logits, "float32")
                    run.greedy(loaded, golden)
                elif reference is not None:
                    expected, other = transformers_logits(source or model, ids, host_available_bytes())
                    run.logits(loaded, "logits of transformers", x, expected, other)
    if source is not None:
        run.source(source, progress)
    return run.report(tokens, time.perf_counter() - begin)


def _prompt(model: LanguageModel, tokens: int, seed: int) -> NDArray[np.int32]:
    longest = model.decoder.max_positions
    if tokens > longest:
        raise ValueError(f"max_tokens: found {tokens}, expected at most {longest}, the positions of the model")
    return np.random.default_rng(seed).integers(0, model.decoder.vocab_size, (1, tokens), np.int32)


def _check_golden(model: LanguageModel, golden: Golden | None, where: str) -> None:
    """Refuses results that are of another model."""
    if golden is None:
        return
    size = model.decoder.vocab_size
    if golden.logits.shape[-1] != size or not 0 <= golden.input_ids.min() <= golden.input_ids.max() < size:
        raise ValueError(
            f"{where}: found logits of {golden.logits.shape[-1]} tokens and ids up to {golden.input_ids.max()}, "
            f"expected those of a vocabulary of {size}"
        )


@dataclasses.dataclass
class _Run:
    """One validation: what was found so far."""

    model: Path
    dtype: str
    checks: list[ValidationCheck] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)
    layers: list[LayerActivations] = dataclasses.field(default_factory=list)

    def add(self, name: str, detail: str, failures: list[str]) -> None:
        """Notes an answer."""
        self.checks.append(ValidationCheck(name, "FAILED" if failures else "ok", detail))
        self.failures += failures

    def skip(self, reason: str, reference: object, *, has_activations: bool = False) -> None:
        """Notes what is not looked at."""
        names = [] if has_activations else ["activations"]
        names += ["cache", *(["reference"] if reference is not None else [])]
        self.checks += [ValidationCheck(name, "skipped", reason) for name in names]

    def tensors_fit(self) -> bool:
        fields, file = read_config(self.model)
        architecture = architecture_of(fields, str(file))
        try:
            architecture.check(self.model, fields, str(file))
        except (CheckpointError, MappingError) as fault:
            first, *others = str(fault).splitlines()
            failures = [line.strip() for line in others] or [first]
            self.add("config and tensors", f"{len(failures)} mismatches", failures)
            return False
        self.add("config and tensors", "every parameter is there once, with its shape", [])
        return True

    def values(self, checkpoint: Checkpoint) -> None:
        counts = count_values(checkpoint)
        self.add("values", str(counts), list(counts.failures))

    def activations(self, model: LanguageModel, ids: NDArray[np.int32], golden: Golden | None) -> NDArray[Any] | None:
        """The stream after the last norm; None if something before it is not finite."""
        hidden = _hidden_by_name(golden, model)
        worst: list[str] = []
        compared: dict[str, Comparison] = {}
        x: NDArray[Any] = np.zeros(0)
        for output in model.decoder.layers(model.params, ids):
            measured = activations(output)
            self.layers.append(measured)
            x = np.asarray(output.stream)
            if measured.nonfinite:
                worst.append(
                    f"{output.name}: found {measured.nonfinite} of {x.size} activations that are NaN or infinite, "
                    "expected none"
                )
            if output.name in hidden:
                compared[output.name] = comparison = Comparison(self.dtype)
                comparison.add(x, hidden[output.name])
        # What comes behind the first is its consequence.
        self.add("activations", f"{len(self.layers)} parts of the model, {len(worst)} not finite", worst[:1])
        if worst:
            return None
        if compared:
            wrong = [f"{name}: {comparison}" for name, comparison in compared.items() if not comparison.ok]
            last = max(compared.values(), key=lambda comparison: comparison.largest)
            self.add("stream behind layers", f"{len(compared)} layers, the farthest: {last}", wrong[:1])
        return x

    def cache(self, model: LanguageModel, ids: NDArray[np.int32], x: NDArray[Any]) -> None:
        cached = cached_stream(model.decoder, model.params, ids)
        comparison = Comparison(self.dtype)
        blocks = zip(_logits(model, cached), _logits(model, x), strict=True)
        for (_, found), (_, expected) in blocks:
            comparison.add(found, expected)
        self._compared("cache", comparison)

    def logits(self, model: LanguageModel, name: str, x: NDArray[Any], expected: NDArray[Any], dtype: str) -> None:
        comparison = Comparison("float32" if self.dtype == dtype == "float32" else "bfloat16")
        for where, found in _logits(model, x):
            comparison.add(found, expected[:, where])
        self._compared(name, comparison)

    def greedy(self, model: LanguageModel, golden: Golden) -> None:
        # In bfloat16 two tokens may be equally likely: what follows says nothing.
        if golden.greedy_ids is None or self.dtype != "float32":
            return
        given = golden.input_ids.shape[1]
        expected = golden.greedy_ids[given:].tolist()
        if not expected:
            return
        found = model.generate(golden.input_ids[:1], max_new_tokens=len(expected), temperature=0, ignore_eos=True)
        found = found[0, given:].tolist()
        same = next((n for n, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), len(found))
        failures = []
        if same < len(expected):
            failures = [f"greedy tokens: found {found[same]} as number {same}, expected {expected[same]}"]
        self.add("greedy tokens", f"{same} of {len(expected)} are the same", failures)

    def source(self, source: str | os.PathLike[str], progress: Progress) -> None:
        verification = verify(self.model, source, progress=progress)
        detail = f"{verification.tensors} tensors compared with {source}"
        self.add("source", detail, [str(failure) for failure in verification.failures])

    def report(self, tokens: tuple[int, int], seconds: float) -> ValidationReport:
        return ValidationReport(
            model=self.model,
            ok=not self.failures,
            failures=tuple(self.failures),
            checks=tuple(self.checks),
            layers=tuple(self.layers),
            dtype=self.dtype,
            tokens=tokens,
            seconds=seconds,
        )

    def _compared(self, name: str, comparison: Comparison) -> None:
        self.add(name, str(comparison), [] if comparison.ok else [f"{name}: {comparison}"])


def _logits(model: LanguageModel, x: NDArray[Any]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    return logits_of(model.decoder, model.params, x)


def _hidden_by_name(golden: Golden | None, model: LanguageModel) -> dict[str, NDArray[Any]]:
    """Stored streams, under the names of the model's parts."""
    if golden is None:
        return {}
    last = model.config.num_hidden_layers - 1
    for layer, array in golden.hidden.items():
        if layer > last or array.shape[-1] != model.config.hidden_size:
            raise ValueError(
                f"hidden_{layer}: found {list(array.shape)}, expected a layer up to {last} of width "
                f"{model.config.hidden_size}"
            )
    return {"final norm" if layer == last else f"layer {layer}": array for layer, array in golden.hidden.items()}
