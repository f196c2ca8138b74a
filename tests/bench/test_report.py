from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gemma2_fast.bench import plots
from gemma2_fast.bench.record import write_record
from gemma2_fast.bench.report import markdown, plain, table
from gemma2_fast.cli import main
from gemma2_fast.errors import BackendError
from tests.bench import results

KINDS = ("machine", "ops", "generate", "flat", "peers")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = []
    for kind in KINDS:
        paths.append(str(tmp_path / f"{kind}.json"))
        write_record(Path(paths[-1]), getattr(results, kind)())
    return paths


def test_table_by_hand() -> None:
    assert table(("a", "b"), [(1, "x"), (2, "y")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |\n"


def test_settings_in_plain_words() -> None:
    assert plain({"quantization": "int8", "list": [1, 2]}) == "quantization=int8 list=1,2"
    assert plain({}) == "none"
    assert plain(0.123456) == "0.1235"


def test_markdown_has_every_figure_with_its_origin(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["bench", "report", *files, "--out", str(out), "--no-plots"]) == 0
    text = (out / "report.md").read_text()
    for line in (
        "| avx2 | 2 | 20.0 | 300.0 | 1200.0 |",
        "| matmul BF16 | 2b gate [9216, 2304] x 1 | avx2 | 2 | 1000.0 | 16.0 GB/s | 80 % of 20 | 1.0e-06 |",
        "| prefill 512 | 256.00 | 2.000 s to the first token | 768 GOP/s "
        "| 64 % of the int8 peak, 256 % of the float32 peak | 20.0, 300, 1200 | 3.00 |",
        "| decode at context 16, batch 8 | 64.00 | 125.0 ms a step | 16.0 GB/s of 2.000 GB "
        "| 80 % of the read bandwidth | 20.0, 300, 1200 | 3.00 |",
        "| prompt | rg | 30000 | 6.90 | 0.985 | 3.00 | 41.00 | 80 % of the read bandwidth |",
        "| context | g | 8000 | 6.50 |  |  |  | 80 % of the read bandwidth |",
        "| 4000 | 1000.0 | 20.00 |\n| 5000 | 1000.0 | 20.00 |\n",
        "slope   from token 500: speed +0.00 % in 10,000 tokens, memory +1.0 bytes a token",
        "| decode at context 64, batch 8 | llama_cpp | 40.00 | 1.50 | 70 % of the read bandwidth | 20.0, 300, 1200 |",
        "| llama_cpp | 2b.gguf | 2.600 | 1.0 | 3.00 | not compared: other weights |",
    ):
        assert line in text
    processor = results.machine()["machine"]["processor"]
    assert text.count(processor) == len(KINDS)
    assert text.count("commit ") == len(KINDS)
    assert "llama-cpp-python 0.3.36" in text
    assert [path.name for path in out.iterdir()] == ["report.md"]


def test_sections_follow_the_files() -> None:
    text = markdown([results.peers(), results.machine()], ["roofline.png"])
    assert text.index("![roofline](roofline.png)") < text.index("Beside other engines") < text.index("Ceilings")


def test_plots(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["bench", "report", *files, "--out", str(out)]) == 0
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == ["batch.png", "context.png", "flat.png", "roofline.png", "series.png"]
    assert all((out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in pictures)
    assert "![context](context.png)" in (out / "report.md").read_text()


def test_only_plots_with_figures_are_drawn(tmp_path: Path) -> None:
    assert plots.draw([results.machine()], tmp_path) == []
    assert plots.draw([results.ops()], tmp_path) == ["roofline.png"]
    assert plots.draw([results.peers()], tmp_path) == ["batch.png"]
    assert plots.draw([results.flat()], tmp_path) == ["flat.png", "series.png"]


def test_without_matplotlib_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendError, match=r"pip install 'gemma2-fast\[bench\]', or ask for --no-plots"):
        plots.draw([results.ops()], tmp_path)


def test_a_foreign_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text("[1]")
    assert main(["bench", "report", str(tmp_path / "r.json"), "--out", str(tmp_path)]) == 1
    assert "no result of this version" in capsys.readouterr().err
    assert main(["bench", "report", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 1
