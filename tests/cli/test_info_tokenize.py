from __future__ import annotations

import json

import pytest

from gemma2_fast.cli import main
from tests.cli.fake_generator import FakeGenerator

Capture = pytest.CaptureFixture[str]


def test_info_prints_the_description(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["info", "m", "--instruction-set", "avx2", "--max-batch-size", "3"]) == 0
    assert capsys.readouterr().out == "model  gemma2\ncache  1.00 GiB\n"
    assert fake.options == {"instruction_set": "avx2", "max_batch_size": 3, "progress": True}


def test_info_as_json(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["info", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": {"family": "gemma2"}}


def test_tokenize_shows_ids_and_pieces(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["tokenize", "m", "a\n"]) == 0
    assert capsys.readouterr().out == "      2  '<bos>'\n     97  'a'\n     10  '\\n'\n"


def test_tokenize_as_json_without_bos(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["tokenize", "m", "--json", "--no-bos", "aé"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ids": [97, 233], "pieces": ["a", "é"]}


def test_half_a_character_is_shown_as_its_byte(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["tokenize", "m", "--no-bos", "aÿ"]) == 0
    assert capsys.readouterr().out == "     97  'a'\n    255  '\\\\xff'\n"


def test_decode(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["tokenize", "m", "--decode", "97, 98 99"]) == 0
    assert capsys.readouterr().out == "abc\n"


def test_decode_refuses_what_is_no_id(fake: FakeGenerator, capsys: Capture) -> None:
    assert main(["tokenize", "m", "--decode", "97 x"]) == 1
    assert "--decode takes ids" in capsys.readouterr().err


def test_model_without_a_tokenizer(fake: FakeGenerator, capsys: Capture) -> None:
    fake.tokenizer = None
    assert main(["tokenize", "m", "a"]) == 1
    assert (
        capsys.readouterr().err
        == "gemma2-fast: error: m has no tokenizer (looked for tokenizer.model, tokenizer.json)\n"
    )
