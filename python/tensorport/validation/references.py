"""What others compute: stored in a file, or by transformers now."""

import dataclasses
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tensorport.checkpoint import Checkpoint

__all__ = ["Golden", "read_golden", "transformers_logits"]


@dataclasses.dataclass(frozen=True, slots=True)
class Golden:
    """Stored results.

    Attributes:
        input_ids: [B, T].
        logits: [B, T, V].
        greedy_ids: [T + N], row 0 of the input and its greedy continuation; None if it was not stored.
        hidden: by layer [B, T, H], the stream behind it; behind the last one and the last norm.
    """

    input_ids: NDArray[np.int32]
    logits: NDArray[Any]
    greedy_ids: NDArray[np.int32] | None
    hidden: Mapping[int, NDArray[Any]]


def read_golden(path: str | os.PathLike[str]) -> Golden:
    """Reads `input_ids` and `logits`, and `greedy_ids`, `hidden_0`, `hidden_1` and so on where they are stored.

    Raises:
        OSError: there is no such file.
        ValueError: it is no npz, an array is missing, or has another shape or dtype.
    """
    file = Path(path)
    try:
        with np.load(file, allow_pickle=False) as stored:
            wanted = [name for name in stored.files if re.fullmatch(r"input_ids|logits|greedy_ids|hidden_\d+", name)]
            arrays = {name: stored[name] for name in wanted}
    except (ValueError, zipfile.BadZipFile, AttributeError, EOFError) as fault:
        raise ValueError(f"{file}: found no npz that can be read, expected one: {fault}") from fault
    missing = [name for name in ("input_ids", "logits") if name not in arrays]
    if missing:
        raise ValueError(f"{file}: found no {' and no '.join(missing)}, expected input_ids [B, T] and logits [B, T, V]")
    ids, logits, greedy = arrays["input_ids"], arrays["logits"], arrays.get("greedy_ids")
    hidden = {int(name.removeprefix("hidden_")): array for name, array in arrays.items() if name.startswith("hidden_")}
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.size == 0:
        raise ValueError(f"{file}: input_ids: found {ids.dtype} {list(ids.shape)}, expected integers [B, T]")
    for name, array in {"logits": logits, **{f"hidden_{layer}": array for layer, array in hidden.items()}}.items():
        if array.ndim != 3 or array.shape[:2] != ids.shape or array.dtype.kind != "f":
            raise ValueError(
                f"{file}: {name}: found {array.dtype} {list(array.shape)}, expected floats {[*ids.shape, '...']}"
            )
    if greedy is not None and not (
        greedy.ndim == 1 and greedy.dtype.kind in "iu" and np.array_equal(greedy[: ids.shape[1]], ids[0])
    ):
        raise ValueError(f"{file}: greedy_ids: found other ids, expected row 0 of input_ids and what follows it")
    return Golden(ids.astype(np.int32), logits, None if greedy is None else greedy.astype(np.int32), hidden)


def transformers_logits(
    folder: Path, input_ids: NDArray[np.int32], available_bytes: float
) -> tuple[NDArray[np.float32], str]:
    """Logits [B, T, V] by Hugging Face transformers, on the CPU, and the dtype of its computation.

    It decodes MXFP4: float32 if half of the available memory has room for all parameters, else bfloat16.

    Raises:
        ImportError: torch or transformers is not installed.
        ValueError: the folder is not in the layout that transformers reads.
    """
    if not (folder.is_dir() and any(folder.glob("*.safetensors")) and (folder / "config.json").is_file()):
        raise ValueError(
            f"{folder}: transformers reads checkpoints in the layout of Hugging Face alone; for a converted tree name "
            "the checkpoint that it was made from as the source"
        )
    try:
        import torch  # noqa: PLC0415 - no dependency
        import transformers  # noqa: PLC0415 - no dependency
    except ImportError as fault:
        raise ImportError("the reference needs torch and transformers: pip install torch transformers") from fault
    fits = Checkpoint(folder).total_parameters * 4 <= available_bytes / 2
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.float32 if fits else torch.bfloat16,
        attn_implementation="eager",
        local_files_only=True,
    ).eval()
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(input_ids.astype(np.int64))).logits.float().numpy()
    return logits, "float32" if fits else "bfloat16"
