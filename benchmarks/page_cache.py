"""Brings the files of a folder into the page cache, or drops them from it, and sees how much is there. Linux only."""

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_READ_BYTES = 16 * 2**20


def warm(folder: Path) -> None:
    """Reads every file once."""
    buffer = bytearray(_READ_BYTES)
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(folder: Path) -> None:
    """Asks the kernel to forget every file; a tmpfs cannot. The host of a virtual machine may still have the bytes."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # dirty pages stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(folder: Path) -> float:
    """The share of the files' pages that is in memory, from 0 to 1, by mincore."""
    resident = total = 0
    for path in _files(folder):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            pages = np.empty(-(-len(mapping) // mmap.PAGESIZE), np.uint8)
            bytes_ = np.frombuffer(mapping, np.uint8)
            address, length = bytes_.ctypes.data, ctypes.c_size_t(len(mapping))
            del bytes_  # a mapping with views cannot be closed
            if _LIBC.mincore(ctypes.c_void_p(address), length, ctypes.c_void_p(pages.ctypes.data)):
                errno = ctypes.get_errno()
                raise OSError(errno, os.strerror(errno), str(path))
            resident += int(np.count_nonzero(pages & 1))
            total += len(pages)
    return resident / total


def _files(folder: Path) -> Iterator[Path]:
    """The files that hold anything."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size)
