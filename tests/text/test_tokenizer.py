"""The face: what every backend has to give."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from gemma2_fast.errors import RequestError, TokenizerError
from gemma2_fast.text import Tokenizer
from tests.text.vocabulary_files import DATA, FIRST_BYTE_ID

VECTORS = json.loads((DATA / "gemma_tokenizer_vectors.json").read_text())["vectors"]


def test_two_words_and_a_bos(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode("Hello world") == [2, 4521, 2134]
    assert any_tokenizer.decode([2, 4521, 2134]) == "Hello world"


def test_there_are_56_vectors() -> None:
    assert len(VECTORS) == 56


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: repr(vector["text"])[:30])
def test_public_vector(any_tokenizer: Tokenizer, vector: dict[str, object]) -> None:
    assert any_tokenizer.encode(vector["text"], add_bos=False) == vector["ids"]
    assert any_tokenizer.encode_content(vector["text"]) == vector["ids"]
    assert any_tokenizer.decode(vector["ids"]) == vector["text"]


def test_ids_by_name(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.vocab_size == 256000
    assert (any_tokenizer.pad_id, any_tokenizer.eos_id, any_tokenizer.bos_id) == (0, 1, 2)
    assert (any_tokenizer.start_of_turn_id, any_tokenizer.end_of_turn_id) == (106, 107)
    assert any_tokenizer.control_ids == {0, 1, 2, 4, 5, 6, 106, 107}


@pytest.mark.parametrize("text", ["", "x", " x", "\n", "<bos>", "<bos>x", "<bos><bos>x", "<bos> x", "a<bos>x"])
def test_exactly_one_bos_first(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert ids[0] == 2
    assert ids.count(2) == 1


def test_bos_spelled_at_the_start_is_the_bos(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode("<bos>Hello") == any_tokenizer.encode("Hello") == [2, 4521]
    assert any_tokenizer.encode("<bos><bos>Hello") == [2, 4521]
    assert any_tokenizer.encode("<bos>Hello", add_bos=False) == [2, 4521]
    assert any_tokenizer.encode("Hello", add_bos=False) == [4521]


def test_control_pieces_elsewhere_are_text(any_tokenizer: Tokenizer, oracle: SentencePieceProcessor) -> None:
    for text in ("a<bos>", "a<eos>b", "<pad>", "<unk>", " <bos>"):
        assert any_tokenizer.encode(text, add_bos=False) == oracle.encode(text)


def test_markers_in_a_prompt_become_their_ids(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode("<start_of_turn>user\nHi<end_of_turn>\n") == [2, 106, 1645, 108, 2151, 107, 108]
    assert any_tokenizer.encode("<mask><unused5>[@BOS@]") == [2, 4, 12, 6]
    assert any_tokenizer.encode("<unused500>") == any_tokenizer.encode("<bos>") + any_tokenizer.encode_content(
        "<unused500>"
    )


MARKERS = ["<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<pad>", "<mask>", "<2mass>", "[@BOS@]", "<unused42>"]


@pytest.mark.parametrize("marker", MARKERS)
def test_markers_in_content_stay_text(any_tokenizer: Tokenizer, marker: str) -> None:
    for text in (marker, f"a {marker}b", marker * 3, f"<start_of_turn{marker}>", f"<<bos>{marker}"):
        ids = any_tokenizer.encode_content(text)
        assert not {*range(8), *range(7, 108)} & set(ids)
        assert any_tokenizer.decode(ids) == text


def test_content_keeps_tags_and_runs(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode_content("<h1>") == [185]
    assert any_tokenizer.encode_content("\n\n\n") == [110]
    assert any_tokenizer.encode_content("   </table>") == [140, 177]


@pytest.mark.parametrize("character", [" ", "\t", "\n"])
@pytest.mark.parametrize("around", ["{}", "a{}b", "<h1>{}<h1>", " {}\n"])
def test_runs_of_whitespace(
    any_tokenizer: Tokenizer, oracle: SentencePieceProcessor, character: str, around: str
) -> None:
    for length in range(1, 61):
        text = around.format(character * length)
        ids = any_tokenizer.encode(text, add_bos=False)
        assert ids == oracle.encode(text), repr(text)
        assert any_tokenizer.decode(ids) == text


def test_a_run_longer_than_the_longest_piece(any_tokenizer: Tokenizer) -> None:
    """The tokenizers library by itself makes 16 + 24 of it: its file merges runs pair by pair."""
    assert any_tokenizer.encode(" " * 40, add_bos=False) == [168, 146]  # 31 + 9


def test_a_literal_lower_block_is_a_space(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode("▁▁a▁b") == any_tokenizer.encode("  a b")


def test_nul(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode("a\0b") == [2, 235250, FIRST_BYTE_ID, 235268]
    assert any_tokenizer.decode([235250, FIRST_BYTE_ID, 235268]) == "a\0b"


@pytest.mark.parametrize("text", ["\ud800", "ok \udc80", "\udfff tail"])
def test_lone_surrogates_are_refused(any_tokenizer: Tokenizer, text: str) -> None:
    for encode in (any_tokenizer.encode, any_tokenizer.encode_content):
        with pytest.raises(TokenizerError, match="lone surrogate"):
            encode(text)


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["a"]])
def test_only_str_is_text(tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(TokenizerError, match="must be a str"):
        tokenizer.encode(text)


def byte_ids(data: bytes) -> list[int]:
    return [FIRST_BYTE_ID + byte for byte in data]


def test_byte_pieces_join_into_characters(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.decode(byte_ids("é€🦙".encode())) == "é€🦙"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x80", "�"),
        (b"\xe2\x82", "��"),
        (b"\xe2\x82A", "��A"),
        (b"\xf0\x9f\x98", "���"),
        (b"\xed\xa0\x80", "���"),
        (b"\xc0\x80", "��"),
        (b"\xf4\x90\x80\x80", "����"),
        (b"\xff\xe2\x82\xac\xfe", "�€�"),
    ],
)
def test_every_invalid_byte_is_one_replacement(
    any_tokenizer: Tokenizer, oracle: SentencePieceProcessor, data: bytes, text: str
) -> None:
    assert any_tokenizer.decode(byte_ids(data)) == text == oracle.decode(byte_ids(data))


def test_control_ids_are_skipped_or_spelled(any_tokenizer: Tokenizer) -> None:
    ids = [2, 106, 1645, 108, 2151, 107, 1]
    assert any_tokenizer.decode(ids) == "user\nHi"
    assert any_tokenizer.decode(ids, skip_control=False) == "<bos><start_of_turn>user\nHi<end_of_turn><eos>"


def test_the_first_space_is_kept(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.decode([25957, 2134]) == " Hello world"


def test_unknown_decodes_as_sentencepiece_has_it(any_tokenizer: Tokenizer, oracle: SentencePieceProcessor) -> None:
    assert any_tokenizer.decode([3, 4521]) == oracle.decode([3, 4521])


def test_piece_bytes(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.piece_bytes(25957) == b" Hello"
    assert any_tokenizer.piece_bytes(FIRST_BYTE_ID + 0xE2) == b"\xe2"
    assert any_tokenizer.piece_bytes(np.int32(107)) == b"<end_of_turn>"


@pytest.mark.parametrize("token_id", [-1, 256000, 10**12])
def test_ids_out_of_range(any_tokenizer: Tokenizer, token_id: int) -> None:
    for call in (any_tokenizer.piece_bytes, lambda bad: any_tokenizer.decode([4521, bad])):
        with pytest.raises(RequestError, match=rf"{token_id} .*256000"):
            call(token_id)


@pytest.mark.parametrize("token_id", [1.0, "2", None])
def test_ids_must_be_integers(tokenizer: Tokenizer, token_id: object) -> None:
    with pytest.raises(RequestError, match="integer"):
        tokenizer.decode([token_id])


def test_importing_the_room_loads_no_tokenizer_library() -> None:
    program = (
        "import sys, gemma2_fast.text; print(sorted({'sentencepiece', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
