"""Where kernels come from when a GPU is to be used: shipped, compiled before, compiled now, or nowhere."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gemma2_fast.engine import gpu_kernels
from gemma2_fast.engine.gpu_kernels import kernel_images
from gemma2_fast.errors import BackendError
from gemma2_fast.triton_kernels import manifest
from gemma2_fast.triton_kernels.manifest import sources_digest
from tests.triton_kernels.test_manifest import write


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_shipped_kernels_need_no_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_kernels, "find_spec", lambda name: None)
    (tmp_path / "shipped").mkdir()
    write(tmp_path / "shipped")
    assert len(kernel_images(90)) == 1
    with pytest.raises(
        BackendError, match=r'no GPU kernels for sm_120: `pip install "gemma2-fast\[cuda\]"` brings Triton'
    ):
        kernel_images(120)


def test_what_triton_compiles_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = []

    def compile_one(arch: int, directory: Path) -> None:
        directory.mkdir()
        write(directory)
        compiled.append(arch)

    monkeypatch.setattr(gpu_kernels, "_compile", compile_one)
    with caplog.at_level(logging.WARNING, "gemma2_fast"):
        assert len(kernel_images(90)) == len(kernel_images(90)) == 1
    assert compiled == [90]
    assert len(caplog.records) == 1
    (kept,) = (tmp_path / "cache/gemma2_fast/kernels").iterdir()
    assert kept.name.startswith("sm_90-triton-")


def test_other_sources_are_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sources_digest()
    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "manifest.py"))
    (tmp_path / "kernel.py").write_text("1")
    changed = sources_digest()
    (tmp_path / "kernel.py").write_text("2")
    assert len({before, changed, sources_digest()}) == 3


def test_a_compilation_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="compiling GPU kernels for sm_99 failed: .*unknown 99"):
        kernel_images(99)
    assert list((tmp_path / "cache/gemma2_fast/kernels").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where a directory should be")
    with pytest.raises(BackendError, match=r"cannot be kept in .*cache/gemma2_fast/kernels: .*; let XDG_CACHE_HOME"):
        kernel_images(90)


def test_a_gpu_that_is_too_old() -> None:
    with pytest.raises(BackendError, match='need compute capability 8.0 or later, this GPU has 7.5; use backend="cpu"'):
        kernel_images(75)
