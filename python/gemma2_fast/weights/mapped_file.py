"""A file's bytes, read-only and memory-mapped."""

from __future__ import annotations

import contextlib
import mmap
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.errors import FileFormatError


def map_file(path: Path, kind: str) -> NDArray[np.uint8]:
    """Every byte of the file at `path`, mapped for as long as the array or a view of it lives.

    Errors: OSError where it cannot be opened; FileFormatError where it is empty or not a regular file (opening a
    named pipe would wait for ever). `kind` says in the message what was expected.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise FileFormatError(f"{path} is {what}; expected a {kind} file")
    if status.st_size == 0:
        raise FileFormatError(f"{path} is empty; expected a {kind} file: fetch it again")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Decoding reads all weights for every token, and reads them faster from huge pages (docs/decisions/007). Where the
    # system can, what comes from the disk from now on lies on them.
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapped, dtype=np.uint8)


def drop_pages(view: NDArray[np.uint8]) -> None:
    """Take the whole pages of a view of a mapped file out of this process's memory; they are read again when needed.

    Any other array is left alone.
    """
    owner: object = view
    while isinstance(owner, np.ndarray):
        whole, owner = owner, owner.base
    if isinstance(owner, memoryview):
        owner = owner.obj
    if not isinstance(owner, mmap.mmap):
        return
    begin = view.ctypes.data - whole.ctypes.data
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (begin + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        owner.madvise(mmap.MADV_DONTNEED, first, last - first)
