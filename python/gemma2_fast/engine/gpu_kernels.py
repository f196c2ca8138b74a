"""Where the compiled kernels of a GPU come from: the package itself, or Triton, which compiles them once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from gemma2_fast import _core, triton_kernels
from gemma2_fast.errors import BackendError
from gemma2_fast.triton_kernels.manifest import CompiledKernel, read_manifest, sources_digest

SHIPPED = Path(triton_kernels.__file__).parent / "cubins"  # in wheels that were built after `make cubins`

OLDEST_ARCH = 80

log = logging.getLogger("gemma2_fast")


def kernel_images(arch: int) -> list[_core.KernelImage]:
    """All kernels for a compute capability. BackendError where there are none and none can be compiled."""
    if arch < OLDEST_ARCH:
        raise BackendError(
            f'GPU kernels need compute capability 8.0 or later, this GPU has {arch / 10}; use backend="cpu"'
        )
    kernels = read_manifest(SHIPPED, arch) or read_manifest(_compiled(arch), arch)
    return [_image(kernel) for kernel in kernels]


def _compiled(arch: int) -> Path:
    """The directory of what Triton compiled on this machine, now or before."""
    if find_spec("triton") is None:
        raise BackendError(
            f'this build ships no GPU kernels for sm_{arch}: `pip install "gemma2-fast[cuda]"` brings Triton, which '
            'compiles them once, or use backend="cpu"'
        )
    directory = _cache_directory() / f"sm_{arch}-triton-{import_module('triton').__version__}-{sources_digest()[:16]}"
    if not directory.exists():
        log.warning("compiling GPU kernels for sm_%d, once; this takes some minutes", arch)
        try:
            _compile_into(directory, arch)
        except OSError as error:
            raise BackendError(
                f"compiled GPU kernels cannot be kept in {directory.parent}: {error}; let XDG_CACHE_HOME name a "
                "directory that can be written"
            ) from None
    return directory


def _compile_into(directory: Path, arch: int) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as unfinished:
        _compile(arch, Path(unfinished) / "kernels")
        try:
            (Path(unfinished) / "kernels").rename(directory)
        except OSError:  # another process was first
            if not directory.exists():
                raise


def _compile(arch: int, directory: Path) -> None:
    command = [sys.executable, "-m", "gemma2_fast.triton_kernels.build", "--out", str(directory)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, "--targets", str(arch)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise BackendError(f"compiling GPU kernels for sm_{arch} failed: {' '.join(last)}")


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gemma2_fast" / "kernels"


def _image(kernel: CompiledKernel) -> _core.KernelImage:
    return _core.KernelImage(
        op=kernel.op,
        symbol=kernel.symbol,
        constants=kernel.constants,
        parameters=[(argument.name, argument.type, argument.divisible_by_16) for argument in kernel.arguments],
        pointer_alignment_bytes=kernel.pointer_alignment_bytes,
        num_warps=kernel.num_warps,
        dynamic_shared_bytes=kernel.shared_bytes,
        hidden_pointers=kernel.hidden_pointers,
        dependent_launch=kernel.dependent_launch,
        code=kernel.code,
    )
