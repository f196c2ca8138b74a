"""sentencepiece, tokenizers and GGUF give the ids of the official model, also where the libraries alone differ."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from gemma2_fast.text import Tokenizer
from tests.text.vocabulary_files import ADDED_IN_JULY, gguf_metadata

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 3.14159, isn't it?",
    "def fibonacci(n):\n    if n < 2:\n\t\treturn n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "<table><tr><td>1</td><td>&nbsp;</td></tr></table>\n<h1>Café</h1><code>x  =  1</code></strong><b><i>",
    "生活的真谛是 日本語のテキスト 한국어 텍스트 ภาษาไทย हिन्दी العربية עברית",
    "🦙🚀👩‍👩‍👧‍👦🏳️‍🌈 ✅ 😶‍🌫️ e\u0301 \u200b\u200d\ufeff \U0010ffff \ue000",
    "\0\x01\x1b[0m\x7f\x80\xff\r\n\r\n\v\f\u2028\u2029\u00a0",
    "<start_of_turn>user\n<start_of_turn><end_of_turn>\n<mask> <unused99><unused7>[@BOS@]<2mass>",
    "   leading, trailing   \n\n\n   \t\t\t\t mixed \t \n \t\n",
    "supercalifragilisticexpialidocious" * 20,
    "1234567890" * 10 + " ½ ² Ⅷ ①",
    "a" * 1000 + "!" * 500 + "ab" * 300,
    "▁literal▁▁blocks ▁ ▁",
    "<0x41><0xE2>\ud7ff",
]

FRAGMENTS = [*"ab <>[]_\n\t\r\0▁'é生🦙", "  ", " " * 33, "\n\n", "\t\t\t", "the", " the", "in", "\u0301", "\ud7ff"]
FRAGMENTS += ["<h1>", "</td>", "<start_of_turn>", "<end_of_turn>", "<b", "<unused3>", "<mask>", "<eos>", "x<bos>", "1"]
fragments = st.sampled_from(FRAGMENTS)
texts = st.one_of(st.text(max_size=60), st.lists(fragments, max_size=25).map("".join)).filter(
    lambda text: not text.startswith("<bos>")
)


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_corpus(any_tokenizer: Tokenizer, oracle: SentencePieceProcessor, text: str) -> None:
    assert any_tokenizer.encode(text, add_bos=False) == oracle.encode(text)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(text=texts)
def test_any_text(
    tokenizer: Tokenizer,
    json_tokenizer: Tokenizer,
    gguf_tokenizer: Tokenizer,
    oracle: SentencePieceProcessor,
    text: str,
) -> None:
    expected = oracle.encode(text)
    assert tokenizer.encode(text, add_bos=False) == expected
    assert json_tokenizer.encode(text, add_bos=False) == expected
    assert gguf_tokenizer.encode(text, add_bos=False) == expected
    content = tokenizer.encode_content(text)
    assert json_tokenizer.encode_content(text) == content
    assert gguf_tokenizer.encode_content(text) == content
    assert tokenizer.decode(content) == text.replace("▁", " ")


def test_every_atom_alone(any_tokenizer: Tokenizer, oracle: SentencePieceProcessor) -> None:
    for token_id in [*range(4, 217), *range(255968, 256000)]:
        spelling = oracle.id_to_piece(token_id).replace("▁", " ")
        assert any_tokenizer.encode(spelling, add_bos=False) == [token_id]


def test_all_backends_have_the_same_pieces(
    tokenizer: Tokenizer, json_tokenizer: Tokenizer, gguf_tokenizer: Tokenizer
) -> None:
    for token_id in range(tokenizer.vocab_size):
        piece = tokenizer.piece_bytes(token_id)
        assert json_tokenizer.piece_bytes(token_id) == piece
        assert gguf_tokenizer.piece_bytes(token_id) == piece


def test_a_gguf_of_the_newer_checkpoint(oracle: SentencePieceProcessor) -> None:
    newer = Tokenizer.from_gguf_metadata(gguf_metadata(oracle, ADDED_IN_JULY))
    for text in [*CORPUS, "[toxicity=0]", "\t" * 40]:
        assert newer.encode(text, add_bos=False) == oracle.encode(text)


def test_atoms_that_the_first_tokenizer_json_does_not_list(any_tokenizer: Tokenizer) -> None:
    """The library alone gives 235309 1373 235293 235276 235307, two runs of 16, and five pieces."""
    assert any_tokenizer.encode("[toxicity=0]") == [2, 255968]
    assert any_tokenizer.encode("\t" * 32) == [2, 255998, 226]
    assert any_tokenizer.encode("<unused99>") == [2, 255999]


def test_a_saved_truncation_is_not_applied(json_tokenizer: Tokenizer) -> None:
    assert len(json_tokenizer.encode("a b " * 100)) > 200
