"""What a user of the installed package gets."""

from __future__ import annotations

import subprocess
import tomllib
from importlib.metadata import entry_points, metadata, requires
from importlib.resources import files
from pathlib import Path

import pytest

import gemma2_fast
from gemma2_fast import _core

ROOT = Path(__file__).parents[1]
PUBLIC = ["Chunk", "Generation", "Generator", "SamplingParams", "Timings", "TokenLogprob", "Usage", "__version__"]


def test_public_names() -> None:
    assert sorted(gemma2_fast.__all__) == PUBLIC
    assert [name for name in PUBLIC if not hasattr(gemma2_fast, name)] == []


def test_version_and_licence() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = metadata("gemma2-fast")
    assert declared["version"] == gemma2_fast.__version__ == installed["Version"]
    assert installed["License-Expression"] == "Apache-2.0"
    assert installed.get_all("License-File") == ["LICENSE", "NOTICE"]


def test_core_requires_no_torch() -> None:
    core = [line for line in requires("gemma2-fast") or [] if "extra ==" not in line]
    assert len(core) == 6
    assert not [line for line in core if line.startswith(("torch", "triton", "transformers"))]


@pytest.mark.parametrize("name", ["py.typed", "_core.pyi"])
def test_types_are_shipped(name: str) -> None:
    assert files("gemma2_fast").joinpath(name).is_file()


def test_script() -> None:
    (script,) = entry_points(group="console_scripts", name="gemma2-fast")
    assert script.value == "gemma2_fast.cli:main"


def test_extension_links_neither_torch_nor_cuda() -> None:
    assert _core.__file__ is not None
    needed = subprocess.run(["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True).stdout
    libraries = [line.split("[")[1].rstrip("]") for line in needed.splitlines() if "(NEEDED)" in line]
    assert "libc.so.6" in libraries
    assert not [name for name in libraries if "torch" in name or "cuda" in name or name.startswith(("libcu", "libnv"))]


def test_apache_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
