"""Reads memory-mapped weights into memory ahead of the first token, with a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from gemma2_fast.weights.tensor import Tensor

CHUNK_BYTES = 16 * 2**20
PAGE_BYTES = 4096


def prefault(weights: Mapping[str, Tensor], progress: bool) -> None:
    """Touch every page once, so that the disk is read in order and in sight."""
    with byte_bar("loading", weights, progress) as bar:
        for tensor in weights.values():
            for first in range(0, tensor.num_bytes, CHUNK_BYTES):
                chunk = tensor.data[first : first + CHUNK_BYTES]
                chunk[::PAGE_BYTES].max()
                bar.update(chunk.nbytes)


def byte_bar(what: str, weights: Mapping[str, Tensor], progress: bool) -> Any:
    """A bar over the bytes of `weights`, seen on a terminal once it has taken half a second."""
    from tqdm import tqdm  # costs a tenth of the package's import time

    total = sum(tensor.num_bytes for tensor in weights.values())
    hidden = not (progress and sys.stderr.isatty())
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=0.5, disable=hidden)
