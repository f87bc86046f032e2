"""One run of benchmarks/generate.py with transformers on torch; MXFP4 becomes bfloat16, for torch on CPU has no other.

usage: python transformers_generate.py CHECKPOINT JSON
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, Mxfp4Config


def main() -> None:
    source, sizes = sys.argv[1], json.loads(sys.argv[2])
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).eval()
    figures = {"load_s": time.perf_counter() - start}
    generator = torch.Generator().manual_seed(0)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(0, model.config.vocab_size, shape, generator=generator)

    with torch.inference_mode():
        start = time.perf_counter()
        model(ids(1, 1), use_cache=True)
        figures["first_token_s"] = time.perf_counter() - start

        prompt = ids(1, sizes["prompt"])
        for _ in range(2):
            start = time.perf_counter()
            model(prompt, use_cache=True, logits_to_keep=1)
            figures["prefill_tokens_per_s"] = sizes["prompt"] / (time.perf_counter() - start)

        for batch in sizes["batches"]:
            out = model(ids(batch, 16), use_cache=True, logits_to_keep=1)
            half = sizes["new"] // 2
            for step in range(2 * half):
                if step == half:
                    start = time.perf_counter()
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            figures[f"decode_{batch}_ms"] = 1e3 * (time.perf_counter() - start) / half
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
