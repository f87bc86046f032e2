"""The side of PyTorch in benchmarks/jax_vs_pytorch.py: transformers' own `generate`, with its own defaults.

usage: python transformers_compare.py SETTINGS

SETTINGS is a JSON file. MXFP4 is dequantized when it is loaded, as in the other baselines: transformers computes on
it as it is on GPUs alone, with kernels that it downloads.
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from jax_vs_pytorch_procedure import Clock, Timed, main
from transformers_gpu import load, wait


class PyTorch:
    """A GptOssForCausalLM, timed from outside: what asks whether to stop is called when a token is there."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.device = settings["device"]
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "gpu":
            self.device = "cuda"
        torch.zeros(1, device=self.device)  # starts CUDA, which no measurement is to pay for
        self.model: Any = None

    def load(self) -> int:
        dtype = getattr(torch, self.settings["dtype"])
        self.model = load(self.settings["checkpoint"], self.device, dtype)
        # No token ends a row: all make as many.
        self.model.generation_config.eos_token_id = None
        wait(self.device)
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    def generate(self, prompts: list[list[int]], new: int) -> Timed:
        clock = Clock()
        ids = torch.tensor(prompts, device=self.device)
        how: dict[str, Any] = {"do_sample": False}
        if self.settings["temperature"]:
            torch.manual_seed(self.settings["seed"])
            # Without its default top_k of 50.
            how = {"do_sample": True, "temperature": self.settings["temperature"], "top_k": 0, "top_p": 1.0}

        def has_token(ids: torch.Tensor, _: Any, **__: Any) -> torch.Tensor:
            if clock.first_token_s is None:
                wait(self.device)
                clock.tick()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with torch.inference_mode():
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                pad_token_id=0,
                stopping_criteria=[has_token],
                **how,
            )
        return clock.stop(made[:, ids.shape[1] :].tolist(), new)

    def compiled(self) -> None:
        return None

    def device_peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def facts(self) -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "settings": {
                "threads": torch.get_num_threads(),
                "mxfp4": f"dequantized to {self.settings['dtype']} when loaded",
                "attention": getattr(self.model.config, "_attn_implementation", None),
                "experts": getattr(self.model.config, "_experts_implementation", None),
            },
        }


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    main(PyTorch(settings), settings)
