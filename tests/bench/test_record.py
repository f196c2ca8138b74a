from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from gemma2_fast.bench import record as record_module
from gemma2_fast.bench.record import FIELDS, commit, read_record, record, write_record
from gemma2_fast.errors import FileFormatError
from tests.bench import results


def test_a_record_says_where_when_and_with_what(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_record(path, record("ops", {"threads": 2}, [{"op": "add"}], {"peer": "1.2"}))
    content = read_record(path)
    assert set(content) == {*FIELDS, "commit"}
    assert set(content["machine"]) == {"processor", "instruction_sets", "cpus", "memory_gib", "system"}
    assert content["machine"]["processor"]
    assert content["machine"]["memory_gib"] > 0
    assert set(content["versions"]) == {"gemma2_fast", "python", "numpy", "peer"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", content["date"])
    assert content["settings"] == {"threads": 2}
    assert content["rows"] == [{"op": "add"}]


@pytest.mark.parametrize("make", [results.machine, results.ops, results.generate, results.flat, results.peers])
def test_every_kind_comes_back(make: type, tmp_path: Path) -> None:
    content = make()
    write_record(tmp_path / "r.json", content)
    assert read_record(tmp_path / "r.json") == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no result of this version"),
        ('{"format": "gemma2-fast bench 0"}', "no result of this version"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_record(tmp_path / "r.json")


@pytest.mark.parametrize(("name", "value"), [("rows", None), ("machine", "mine"), ("kind", "speed"), ("versions", [])])
def test_a_damaged_result_is_refused(name: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({**results.machine(), name: value}))
    with pytest.raises(FileFormatError, match=name if name != "kind" else "kind"):
        read_record(tmp_path / "r.json")


def checkout(directory: Path, project: str) -> str:
    """A repository with one commit; what it is called is in its pyproject.toml."""
    (directory / "pyproject.toml").write_text(f'[project]\nname = "{project}"\n')
    git = ["git", "-C", str(directory), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "m"]):
        subprocess.run([*git, *command], check=True)
    done = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = checkout(tmp_path, "gemma2-fast")
    monkeypatch.setattr(record_module, "__file__", str(tmp_path / "record.py"))
    assert commit() == head
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "gemma2-fast"\nversion = "2"\n')
    assert commit() == f"{head} with changes"


def test_commit_of_another_project_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(tmp_path, "something-else")
    monkeypatch.setattr(record_module, "__file__", str(tmp_path / "record.py"))
    assert commit() is None
