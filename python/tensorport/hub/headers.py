"""Headers of safetensors files, on a hub and here: the length field and what it counts, and nothing behind that."""

from pathlib import Path
from typing import Final

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

__all__ = ["local_header", "read_header"]

_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 100_000_000
"""As src/header.rs has them."""

_HEADER_GUESS_BYTES: Final = 1 << 17
"""Most headers are shorter; what is longer is asked for once more."""


def read_header(repo: str, commit: str, path: str) -> bytes:
    """The length field and the header of a file of a repository."""
    end = _HEADER_GUESS_BYTES
    while True:
        begin = _read_beginning(hf_hub_url(repo, path, revision=commit), end)
        wanted = _header_bytes(begin)
        if len(begin) >= wanted or len(begin) < end:
            return begin[:wanted]
        end = wanted


def _header_bytes(begin: bytes) -> int:
    """Bytes of length field and header, by the length field; of one that no reader takes, the field alone."""
    length = int.from_bytes(begin[:_LENGTH_BYTES], "little")
    return _LENGTH_BYTES + (length if length <= _MAX_HEADER_BYTES else 0)


def _read_beginning(url: str, nbytes: int) -> bytes:
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes=0-{nbytes - 1}"}
    content = b""
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) >= nbytes:  # also of a server that ignores ranges
                break
    return content[:nbytes]


def local_header(path: Path) -> bytes:
    """The same of a file that is here."""
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        return length + file.read(_header_bytes(length) - len(length))
