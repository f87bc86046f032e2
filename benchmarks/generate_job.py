"""One run of benchmarks/generate.py with tensorport.

usage: python generate_job.py CHECKPOINT JSON
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorport


def main() -> None:
    source, sizes = Path(sys.argv[1]), json.loads(sys.argv[2])
    jax.devices()
    start = time.perf_counter()
    model = tensorport.load_model(source)
    figures = {"load_s": time.perf_counter() - start}
    rng = np.random.default_rng(0)
    greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "stats": True}

    start = time.perf_counter()
    model.generate([[1]], max_new_tokens=1, **greedy)
    figures["first_token_s"] = time.perf_counter() - start

    ids = rng.integers(0, model.config.vocab_size, sizes["prompt"])
    for _ in range(2):
        stats = model.generate([ids.tolist()], max_new_tokens=1, **greedy).stats
    figures["prefill_tokens_per_s"] = stats.prompt_tokens / stats.prefill_s

    for batch in sizes["batches"]:
        prompts = rng.integers(0, model.config.vocab_size, (batch, 16)).tolist()
        # The first dispatches compile and are not counted; of the others the rate is that of all rows.
        stats = model.generate(prompts, max_new_tokens=sizes["new"], **greedy).stats
        stats = model.generate(prompts, max_new_tokens=sizes["new"], **greedy).stats
        figures[f"decode_{batch}_ms"] = 1e3 * batch / stats.tokens_per_s
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
