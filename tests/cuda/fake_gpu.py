"""A GPU without one: the driver's library is fake_driver.cpp, and Triton's interpreter runs what is launched.

Specialisations are those of triton_kernels with smaller constants, so names, types and order of arguments are the real
ones. The interpreter multiplies bfloat16 matrices by their bit patterns; here they are converted first.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import subprocess
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from gemma2_fast import _core
from gemma2_fast.triton_kernels.specialisation import POINTER_ALIGNMENT, Specialisation

ROOT = Path(__file__).parents[2]
TORCH_TYPES = {
    "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64,
    "i8": torch.int8, "u8": torch.uint8, "i32": torch.int32, "i64": torch.int64,
}  # fmt: skip
KERNEL_FAILED = 719
HIDDEN_POINTERS = 2

_RunKernel = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint, ctypes.c_int,
    ctypes.POINTER(ctypes.c_uint64), ctypes.c_int,
)  # fmt: skip


def build_fake_driver(directory: Path) -> Path:
    library = directory / "libfakecuda.so"
    compiler = os.environ.get("CXX", "c++")
    source = ROOT / "tests/cuda/fake_driver.cpp"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


@dataclasses.dataclass(frozen=True)
class Launch:
    symbol: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    dependent: bool
    arguments: dict[str, int | float]
    hidden: tuple[int, ...]  # pointers after the arguments


class FakeGpu:
    """Kernels by symbol, and every launch so far. `computes`: whether launches are carried out."""

    def __init__(self, library: Path, specialisations: Iterable[Specialisation], computes: bool = True) -> None:
        self.path = str(library)
        self.library = ctypes.CDLL(self.path)
        self.library.fake_calls.restype = ctypes.c_char_p
        self.library.fake_allocation_end.restype = ctypes.c_uint64
        self.library.fake_allocation_end.argtypes = [ctypes.c_uint64]
        self.library.fake_set.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
        self.specialisations = {s.name: s for s in specialisations}
        self.computes = computes
        self.launches: list[Launch] = []
        self._running, self._reached = threading.Event(), threading.Event()
        self._running.set()
        self._callback = _RunKernel(self._run)
        self.library.fake_reset(self._callback)

    def images(self, **changes: Any) -> list[_core.KernelImage]:
        """What a manifest would say of the kernels. changes: of every image."""
        return [self.image(s, **changes) for s in self.specialisations.values()]

    def image(self, specialisation: Specialisation, **changes: Any) -> _core.KernelImage:
        parameters = [
            (name, kind, not kind.startswith("*") and name in specialisation.divisible)
            for name, kind in specialisation.signature().items()
            if kind != "constexpr"
        ]
        fields = {
            "op": specialisation.op,
            "symbol": specialisation.name,
            "constants": {name: int(value) for name, value in specialisation.constants.items()},
            "parameters": parameters,
            "pointer_alignment_bytes": POINTER_ALIGNMENT,
            "num_warps": specialisation.num_warps,
            "dynamic_shared_bytes": 0,
            "hidden_pointers": HIDDEN_POINTERS,
            "dependent_launch": False,
            "code": f"{specialisation.name} {len(parameters) + HIDDEN_POINTERS}".encode(),
        }
        return _core.KernelImage(**{**fields, **changes})

    def device(self) -> _core.CudaDevice:
        return _core.CudaDevice(driver_library=self.path, ordinal=0)

    def calls(self) -> list[str]:
        return self.library.fake_calls().decode().splitlines()

    def fail(self, function: str, after: int, error: int) -> None:
        """Lets calls of a driver's function end in an error, from the one after `after` more on."""
        self.library.fake_fail(function.encode(), after, error)

    @contextlib.contextmanager
    def paused(self) -> Iterator[threading.Event]:
        """Lets the next launch wait for the end of the block; the event says that it is there."""
        self._reached.clear()
        self._running.clear()
        try:
            yield self._reached
        finally:
            self._running.set()

    def _run(
        self, symbol: bytes, grid: Any, threads: int, shared_bytes: int, dependent: int, values: Any, num_values: int
    ) -> int:
        self._reached.set()
        self._running.wait()
        specialisation = self.specialisations[symbol.decode()]
        kinds = {name: kind for name, kind in specialisation.signature().items() if kind != "constexpr"}
        raw = [values[i] for i in range(num_values)]
        arguments = {name: _number(kind, value) for (name, kind), value in zip(kinds.items(), raw, strict=False)}
        launch = Launch(
            specialisation.name,
            tuple(grid[:3]),
            threads,
            shared_bytes,
            bool(dependent),
            arguments,
            tuple(raw[len(kinds) :]),
        )
        self.launches.append(launch)
        if not self.computes:
            return 0
        try:
            self._compute(specialisation, kinds, launch)
        except BaseException:
            traceback.print_exc()  # the caller learns no more than that a kernel failed
            return KERNEL_FAILED
        return 0

    def _compute(self, specialisation: Specialisation, kinds: dict[str, str], launch: Launch) -> None:
        tensors = {
            name: self.tensor(int(launch.arguments[name]), kind[1:]) if kind.startswith("*") else launch.arguments[name]
            for name, kind in kinds.items()
        }
        specialisation.kernel[launch.grid](**tensors, **specialisation.constants)

    def tensor(self, address: int, kind: str) -> torch.Tensor:
        """Device memory from an address to the end of its allocation."""
        end = self.library.fake_allocation_end(address)
        if end == 0:
            raise ValueError(f"address {address:#x} is nobody's")
        dtype = TORCH_TYPES[kind]
        whole = (end - address) // dtype.itemsize * dtype.itemsize
        buffer = (ctypes.c_uint8 * whole).from_address(address)
        return torch.frombuffer(buffer, dtype=dtype)


def _number(kind: str, value: int) -> int | float:
    if kind.startswith("*"):
        return value
    bits = np.uint32(value & 0xFFFFFFFF)
    return float(bits.view(np.float32)) if kind == "fp32" else int(bits.view(np.int32))


def teach_bfloat16(monkeypatch: Any) -> None:
    """Lets the interpreter multiply and round bfloat16 as the hardware does."""
    builder = interpreter.InterpreterBuilder
    usual_dot, usual_cast = builder.create_dot, builder.cast_impl
    bfloat16, float32 = interpreter.tl.bfloat16, interpreter.tl.float32

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        from_bfloat16, to_bfloat16 = source.dtype.scalar == bfloat16, target.scalar == bfloat16
        if from_bfloat16 and not to_bfloat16:
            values = (source.data.astype(np.uint32) << 16).view(np.float32)
            return usual_cast(self, interpreter.TensorHandle(values, float32), target)
        if to_bfloat16 and not from_bfloat16:
            rounded = torch.from_numpy(source.data.astype(np.float32)).to(torch.bfloat16)
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), bfloat16)
        return usual_cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return usual_dot(self, *(cast_impl(self, operand, float32) for operand in (a, b)), *rest)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)
