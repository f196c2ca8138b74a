"""What `make gpu` says of its steps: no failure must read as a pass."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import run

JUNIT = """<testsuites><testsuite>
<testcase name="test_a[one]"><properties><property name="error over bound" value="0.25" />
<property name="error over bound" value="0.5" /></properties></testcase>
<testcase name="test_b" />
{more}
</testsuite></testsuites>"""


def rows(tmp_path: Path, more: str = "", problem: str | None = None) -> list[run.Row]:
    (tmp_path / "out.xml").write_text(JUNIT.format(more=more))
    return list(run.rows_of("kernels", tmp_path / "out.xml", problem))


def test_a_row_is_a_test_and_its_worst_error(tmp_path: Path) -> None:
    found = rows(tmp_path)
    assert found == [run.Row("kernels", "test_a[one]", 0.5, "pass"), run.Row("kernels", "test_b", None, "pass")]
    assert run.table(found).splitlines()[1:] == [
        "pass            0.50  kernels: test_a[one]",
        "pass                  kernels: test_b",
        "2 of 2 passed",
    ]


@pytest.mark.parametrize("kind", ["failure", "error", "skipped"])
def test_what_did_not_pass(tmp_path: Path, kind: str) -> None:
    found = rows(tmp_path, f'<testcase name="test_c"><{kind} message="no" /></testcase>', "ended with status 1")
    assert [row.result for row in found] == ["pass", "pass", kind]
    assert run.table(found).endswith("2 of 3 passed")


def test_a_step_that_broke_off(tmp_path: Path) -> None:
    """With a part of its results, and with none."""
    assert rows(tmp_path, problem="ended with status -11")[-1].result == "ended with status -11"
    assert [row.result for row in run.rows_of("models", tmp_path / "none.xml", None)] == ["ran no test"]


def test_processes(tmp_path: Path) -> None:
    def of(code: str) -> subprocess.Popen[bytes]:
        return run.start([sys.executable, "-c", code], tmp_path / "log")

    assert run.finish(of("print('said')"), 30) is None
    assert (tmp_path / "log").read_text() == "said\n"
    assert run.finish(of("raise SystemExit(3)"), 30) == "ended with status 3"
    began = time.monotonic()
    assert run.finish(of("import time; time.sleep(60)"), 0.2) == "took too long"
    assert time.monotonic() - began < 30
