"""Finding a GPU: every way in which there is none, or one that cannot be used, has its own message."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from gemma2_fast import _core
from gemma2_fast.errors import BackendError
from tests.cuda.fake_gpu import ROOT, FakeGpu

ENOUGH_BYTES = 2**40


@pytest.fixture
def gpu(driver_library: Path) -> FakeGpu:
    return FakeGpu(driver_library, [])


def test_a_device(gpu: FakeGpu) -> None:
    gpu.library.fake_set(12080, 2, 5 * 2**30)
    device = _core.CudaDevice(driver_library=gpu.path, ordinal=1)
    assert (device.name, device.arch, device.free_bytes) == ("Imagined GPU", 90, 5 * 2**30)
    del device
    assert gpu.calls()[-1] == "cuDevicePrimaryCtxRelease"


def test_no_driver(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r'no CUDA driver: .*nowhere.so.*; install NVIDIA.s driver, or use backend="cpu"'
    ):
        _core.CudaDevice(driver_library=str(tmp_path / "nowhere.so"), ordinal=0)


def test_a_library_that_lacks_a_function(tmp_path: Path) -> None:
    library = tmp_path / "libempty.so"
    subprocess.run([os.environ.get("CXX", "c++"), "-shared", "-o", library, "-x", "c++", "/dev/null"], check=True)
    with pytest.raises(BackendError, match=r"libempty.so has no cuInit: update NVIDIA's driver to CUDA 12.3"):
        _core.CudaDevice(driver_library=str(library), ordinal=0)


@pytest.mark.parametrize(
    ("version", "devices", "message"),
    [
        (12000, 1, "knows CUDA 12.0, kernels need 12.3: update NVIDIA's driver"),
        (12030, 0, 'the CUDA driver finds no GPU; use backend="cpu"'),
    ],
)
def test_a_driver_without_use(gpu: FakeGpu, version: int, devices: int, message: str) -> None:
    gpu.library.fake_set(version, devices, ENOUGH_BYTES)
    with pytest.raises(BackendError, match=message):
        gpu.device()


def test_an_ordinal_that_does_not_exist(gpu: FakeGpu) -> None:
    for ordinal in (1, -1):
        with pytest.raises(BackendError, match=f"there is no GPU {ordinal}: the CUDA driver finds 1"):
            _core.CudaDevice(driver_library=gpu.path, ordinal=ordinal)


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_a_call_that_fails(gpu: FakeGpu, function: str) -> None:
    gpu.fail(function, 0, 999)
    with pytest.raises(BackendError, match="CUDA: unknown error 999 while "):
        gpu.device()


TOOLKIT_HEADER = Path("/usr/local/cuda/include/cuda.h")
SAME_AS_CUDA_H = """
#include <cstddef>
#include <type_traits>
#include "cuda/driver.h"
#include <cuda.h>
namespace ours = gemma2_fast;
static_assert(sizeof(CUdeviceptr) == sizeof(ours::CUdeviceptr) && sizeof(CUresult) == sizeof(ours::CUresult));
static_assert(sizeof(CUlaunchConfig) == sizeof(ours::CUlaunchConfig));
static_assert(sizeof(CUlaunchAttribute) == sizeof(ours::CUlaunchAttribute));
static_assert(offsetof(CUlaunchConfig, hStream) == offsetof(ours::CUlaunchConfig, stream));
static_assert(offsetof(CUlaunchConfig, sharedMemBytes) == offsetof(ours::CUlaunchConfig, dynamic_shared_bytes));
static_assert(offsetof(CUlaunchConfig, attrs) == offsetof(ours::CUlaunchConfig, attributes));
static_assert(offsetof(CUlaunchConfig, numAttrs) == offsetof(ours::CUlaunchConfig, num_attributes));
static_assert(offsetof(CUlaunchAttribute, value) ==
              offsetof(ours::CUlaunchAttribute, programmatic_stream_serialization_allowed));
#define SAME(name) static_assert(static_cast<int>(::name) == static_cast<int>(ours::name));
"""


def test_declarations_are_those_of_the_toolkit(tmp_path: Path) -> None:
    """Sizes, offsets and values that csrc/cuda/driver.h declares anew."""
    if not TOOLKIT_HEADER.exists():
        pytest.skip("no CUDA toolkit here, whose header would be the oracle")
    declared = (ROOT / "csrc/cuda/driver.h").read_text(encoding="utf-8")
    values = re.findall(r"^    (CUD?A?_\w+) = \d+,$", declared, re.MULTILINE)
    assert len(values) > 10
    source = tmp_path / "same.cpp"
    source.write_text(SAME_AS_CUDA_H + "\n".join(f"SAME({name})" for name in values))
    compiler = os.environ.get("CXX", "c++")
    includes = [f"-I{ROOT / 'csrc'}", f"-I{TOOLKIT_HEADER.parent}"]
    subprocess.run([compiler, "-std=c++20", "-fsyntax-only", *includes, str(source)], check=True)
