"""The side of JAX in benchmarks/jax_vs_pytorch.py, in a process of its own.

usage: python jax_vs_pytorch_job.py SETTINGS

SETTINGS is a JSON file. With `differences` in it, nothing is measured: for each difference the logits of its two tokens
are looked at.
"""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
import tensorport
from tensorport.text.decoder import new_cache, prefill

sys.path.insert(0, str(Path(__file__).parent))
from jax_vs_pytorch_procedure import Clock, Timed, main

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""What JAX calls the time that XLA takes for one program."""


class Jax:
    """A LanguageModel, timed from outside: a stream's first piece is the first token."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.model: Any = None
        self.compile_s: list[float] = []
        jax.devices()  # starts the backend, which no measurement is to pay for
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        if event == COMPILE_EVENT:
            self.compile_s.append(seconds)

    def load(self) -> int:
        self.model = tensorport.load_model(self.settings["checkpoint"], dtype=self.settings["dtype"])
        jax.block_until_ready(self.model.params)
        return sum(int(leaf.nbytes) for leaf in jax.tree.leaves(self.model.params))

    def generate(self, prompts: list[list[int]], new: int) -> Timed:
        clock = Clock()
        ids: list[list[int]] = [[] for _ in prompts]
        stream = self.model.generate(
            prompts,
            max_new_tokens=new,
            temperature=self.settings["temperature"],
            seed=self.settings["seed"],
            ignore_eos=True,
            stream=True,
        )
        for step in stream:
            clock.tick()
            for row, made in zip(ids, step, strict=True):
                row.extend(made)
        return clock.stop(ids, new)

    def compiled(self) -> tuple[int, float]:
        return len(self.compile_s), sum(self.compile_s)

    def device_peak_bytes(self) -> int | None:
        told = jax.devices()[0].memory_stats()
        return told.get("peak_bytes_in_use") if told else None

    def facts(self) -> dict[str, Any]:
        device = jax.devices()[0]
        return {
            "device": "cpu" if device.platform == "cpu" else device.device_kind,
            "versions": {
                "python": platform.python_version(),
                "tensorport": tensorport.__version__,
                "jax": jax.__version__,
                "jaxlib": jaxlib.__version__,
            },
            "settings": {"threads": len(os.sched_getaffinity(0)), "mxfp4": "kept at 4 bits"},
        }

    def gap(self, ids: list[int], tokens: list[int]) -> float:
        """How far the logits of two tokens behind `ids` are apart, of the largest in magnitude."""
        room = max(128, 1 << len(ids).bit_length())  # few sizes are compiled, and `generate` has the smallest too
        cache = new_cache(self.model.decoder, self.model.params, 1, room)
        last, _ = prefill(self.model.decoder, self.model.params, [np.array(ids, np.int32)], cache)
        logits = np.asarray(self.model.decoder.logits(self.model.params, last)[0], np.float64)
        return float(abs(logits[tokens[0]] - logits[tokens[1]]) / np.abs(logits).max())


def job(settings: dict[str, Any]) -> None:
    side = Jax(settings)
    if "differences" not in settings:
        main(side, settings)
        return
    side.load()
    gaps = [side.gap(difference["ids"], difference["tokens"]) for difference in settings["differences"]]
    Path(settings["rows"]).write_text(json.dumps(gaps))


if __name__ == "__main__":
    job(json.loads(Path(sys.argv[1]).read_text()))
