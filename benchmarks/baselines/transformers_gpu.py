"""transformers on torch in benchmarks/gpu_model.py: experts are dequantized to bfloat16 when they are loaded.

usage: python transformers_gpu.py SETTINGS

SETTINGS is a JSON file; a row of JSON is printed for each case as it ends. Greedy decoding through `generate`, as
there, with transformers' own defaults: no compiling, the cache it chooses itself.
"""

import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_model_rows import Row, Skip, run_cases, say

ROUNDS_S = 8.0  # no other round begins after so long


def load(checkpoint: str, device: str, dtype: torch.dtype) -> Any:
    """A model with its experts dequantized to `dtype`, on the device."""
    # With accelerate weights go to the device as they are read; without it they are all in the host's memory first.
    how = {"device_map": device} if importlib.util.find_spec("accelerate") else {}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype, **how
    )
    return model.to(device).eval()


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


class Job:
    """What the cases share."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.prompts = json.loads(Path(settings["prompts"]).read_text())
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = None

    def cases(self) -> Iterator[tuple[str, str, Callable[[], Row]]]:
        yield "load", "page cache to device", self.load
        for batch in self.settings["batches"]:
            rows = self.prompts["decode"][:batch]
            label = f"{batch} row{'s' * (batch > 1)} after {len(rows[0])} tokens"
            yield "decode", label, functools.partial(self.decode, rows)
        for length in self.settings["prefills"]:
            yield "prefill", f"{length} tokens", functools.partial(self.prefill, length)

    def load(self) -> Row:
        if self.device == "cpu" and not self.settings["is_quick"]:
            raise Skip("torch finds no GPU")
        began = time.perf_counter()
        self.model = load(self.settings["checkpoint"], self.device, torch.bfloat16)
        self.wait()
        nbytes = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        return Row(seconds=time.perf_counter() - began, nbytes=nbytes, is_of_read=False)

    def decode(self, prompts: list[list[int]]) -> Row:
        """A step of all rows: what so many tokens take beyond what one takes."""
        new = self.settings["new"]
        self.time(prompts, 2)
        one_s = min(self.time(prompts, 1) for _ in range(2))
        seconds = [taken_s - one_s for taken_s in self.rounds(functools.partial(self.time, prompts, new))]
        return self.row([len(prompts) * (new - 1) / taken_s for taken_s in seconds], len(prompts))

    def prefill(self, length: int) -> Row:
        """A prompt at once, with the first token."""
        prompt = [self.prompts["prefill"][:length]]
        self.time(prompt, 1)
        return self.row([length / taken_s for taken_s in self.rounds(functools.partial(self.time, prompt, 1))], length)

    def rounds(self, call: Callable[[], float]) -> list[float]:
        taken: list[float] = []
        while len(taken) < self.settings["rounds"] and sum(taken) < ROUNDS_S:
            taken.append(call())
        return taken

    def time(self, prompts: list[list[int]], new: int) -> float:
        if self.model is None:
            raise Skip("the weights are not there")
        ids = torch.tensor(prompts, device=self.device)
        self.wait()
        began = time.perf_counter()
        with torch.inference_mode():
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
        self.wait()
        if made.shape[1] != ids.shape[1] + new:
            raise ValueError(f"new tokens: found {made.shape[1] - ids.shape[1]}, expected {new}")
        return time.perf_counter() - began

    def wait(self) -> None:
        wait(self.device)

    @staticmethod
    def row(rates: list[float], tokens: int) -> Row:
        median = statistics.median(rates)
        if not min(rates) > 0:
            raise ValueError(f"tokens per second: found {rates}, expected more than 0")
        return Row(seconds=tokens / median, spread=(max(rates) - min(rates)) / median, tokens_per_s=median)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    job = Job(settings)
    say(f"torch {torch.__version__} on {job.device}")
    for row in run_cases(job.cases(), settings):
        peak = torch.cuda.max_memory_allocated() if job.device == "cuda" else None
        print(json.dumps(dataclasses.asdict(dataclasses.replace(row, peak_bytes=peak))), flush=True)


if __name__ == "__main__":
    main()
