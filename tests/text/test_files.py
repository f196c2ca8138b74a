"""Which file is taken, what its neighbours add to it, and files that cannot be used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers.models import BPE

from gemma2_fast.errors import ChatError, FileFormatError, TokenizerError
from gemma2_fast.text import (
    TOKENIZER_FILES,
    Tokenizer,
    chat_template_from_gguf,
    find_chat_template,
    find_tokenizer,
)
from tests.text.vocabulary_files import ADDED_IN_JULY, MODEL_FILE, gguf_metadata

TINY_PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "a", "b", "▁", "ab"]


def write_tiny_json(path: Path, pieces: list[str] = TINY_PIECES) -> None:
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = JsonTokenizer(BPE(vocab, [("a", "b")], unk_token="<unk>"))
    tokenizer.add_tokens(pieces[:6])
    tokenizer.save(str(path))


def test_an_empty_directory_has_none(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    assert TOKENIZER_FILES == ("tokenizer.model", "tokenizer.json")


def test_json_alone_is_taken(tmp_path: Path) -> None:
    write_tiny_json(tmp_path / "tokenizer.json")
    found = find_tokenizer(tmp_path)
    assert found is not None
    assert found.vocab_size == len(TINY_PIECES)
    assert found.encode("<start_of_turn>ab a") == [2, 4, 9, 8, 6]
    assert found.encode_content("ab<end_of_turn>").count(5) == 0


def test_the_sentencepiece_model_is_preferred(tmp_path: Path) -> None:
    write_tiny_json(tmp_path / "tokenizer.json")
    shutil.copy(MODEL_FILE, tmp_path)
    (tmp_path / MODEL_FILE.name).rename(tmp_path / "tokenizer.model")
    found = find_tokenizer(tmp_path)
    assert found is not None
    assert found.vocab_size == 256000


def test_added_tokens_of_a_fine_tuned_model(tmp_path: Path) -> None:
    shutil.copy(MODEL_FILE, tmp_path / "tokenizer.model")
    added = {
        "2": {"content": "<bos>", "special": True},
        "67": {"content": "<|fim_prefix|>", "special": True},
        "139": {"content": "▁▁", "special": False},
        "226": {"content": "\t", "special": False},
        "256000": {"content": "<|im_start|>", "special": True},
        "256001": {"content": "<tool>", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    found = find_tokenizer(tmp_path)
    assert found is not None
    assert found.vocab_size == 256002
    assert found.encode("<|im_start|>a<tool><|fim_prefix|>  \t") == [2, 256000, 235250, 256001, 67, 139, 226]
    assert not {256000, 67} & set(found.encode_content("<|im_start|>a<|fim_prefix|>"))
    assert found.encode_content("<tool>") == [256001]
    assert {67, 256000} < found.control_ids
    assert 256001 not in found.control_ids


def test_added_tokens_with_a_hole(tmp_path: Path) -> None:
    shutil.copy(MODEL_FILE, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"256005": {"content": "<x>"}}}')
    with pytest.raises(FileFormatError, match=r"<x>.*256005.*256000"):
        find_tokenizer(tmp_path)


@pytest.mark.parametrize("config", ["[", "[]", '{"added_tokens_decoder": 3}', '{"added_tokens_decoder": {"x": {}}}'])
@pytest.mark.parametrize("entry", [None, '{"added_tokens_decoder": {"1": {"content": 5}}}'])
def test_broken_tokenizer_config(tmp_path: Path, config: str, entry: str | None) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x01")
    (tmp_path / "tokenizer_config.json").write_text(entry or config)
    with pytest.raises(FileFormatError, match=r"tokenizer_config\.json"):
        find_tokenizer(tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        Tokenizer.from_file(tmp_path / "vocab.txt")


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_file(tmp_path / name)


@pytest.mark.parametrize("name", TOKENIZER_FILES)
@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff" * 100, b"\n\x00\n", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_damaged_file(tmp_path: Path, name: str, damage: bytes) -> None:
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(FileFormatError):
        Tokenizer.from_file(tmp_path / name)


def test_a_truncated_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(MODEL_FILE.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="whole sentencepiece model"):
        Tokenizer.from_file(tmp_path / "tokenizer.model")


def test_a_tokenizer_of_another_family(tmp_path: Path) -> None:
    write_tiny_json(tmp_path / "tokenizer.json", ["<pad>", "<eos>", "<bos>", "<unk>", "x", "y", "a", "b", "ab"])
    with pytest.raises(TokenizerError, match="start_of_turn"):
        find_tokenizer(tmp_path)


def test_gguf_arrays_may_be_numpy(oracle: SentencePieceProcessor) -> None:
    metadata = gguf_metadata(oracle, ADDED_IN_JULY)
    for key in ("scores", "token_type"):
        metadata[f"tokenizer.ggml.{key}"] = np.array(metadata[f"tokenizer.ggml.{key}"])
    assert Tokenizer.from_gguf_metadata(metadata).encode("  Hello") == [2, 139, 4521]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda m: m.clear(), TokenizerError, r"tokenizer\.ggml\.model"),
        (lambda m: m.update({"tokenizer.ggml.model": "gpt2"}), TokenizerError, "gpt2"),
        (lambda m: m.pop("tokenizer.ggml.tokens"), TokenizerError, "tokens"),
        (lambda m: m.update({"tokenizer.ggml.scores": []}), TokenizerError, "scores"),
        (lambda m: m["tokenizer.ggml.scores"].pop(), FileFormatError, "length"),
        (lambda m: m["tokenizer.ggml.token_type"].__setitem__(8, 9), FileFormatError, r"\[8\] is 9"),
        (lambda m: m["tokenizer.ggml.tokens"].__setitem__(8, 9), FileFormatError, "expected strings"),
        (lambda m: m["tokenizer.ggml.tokens"].__setitem__(8, "a"), FileFormatError, "sentencepiece"),
        (lambda m: m["tokenizer.ggml.tokens"].__setitem__(3, "c"), TokenizerError, "<unk>"),
    ],
)
def test_gguf_metadata_that_cannot_be_used(
    change: Callable[[dict[str, list[object]]], object], error: type[Exception], match: str
) -> None:
    tokens = [*TINY_PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 6 + [-1.0, -2.0, -3.0, -4.0] + [0.0] * 256,
        "tokenizer.ggml.token_type": [3] * 6 + [1] * 4 + [6] * 256,
    }
    assert Tokenizer.from_gguf_metadata(metadata).encode("ab<start_of_turn>") == [2, 9, 4]
    change(metadata)
    with pytest.raises(error, match=match):
        Tokenizer.from_gguf_metadata(metadata)


@pytest.mark.parametrize("marker_type", [1, 3, 4])
def test_gguf_markers_of_any_type(marker_type: int) -> None:
    tokens = [*TINY_PIECES, "<", *(f"<0x{byte:02X}>" for byte in range(256))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 6 + [-1.0, -2.0, -3.0, -4.0, -5.0] + [0.0] * 256,
        "tokenizer.ggml.token_type": [3, 3, 3, 3, marker_type, marker_type] + [1] * 5 + [6] * 256,
    }
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.encode("<start_of_turn>ab") == [2, 4, 9]
    assert 4 not in tokenizer.encode_content("<start_of_turn>ab")
    assert tokenizer.control_ids == {0, 1, 2, 4, 5}


def test_chat_template_files(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "one"}')
    assert find_chat_template(tmp_path) == "one"
    config.write_text('{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}')
    assert find_chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert find_chat_template(tmp_path) == "from its own file"


def test_chat_template_of_another_type(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "rag", "template": "r"}]}')
    with pytest.raises(ChatError, match="default"):
        find_chat_template(tmp_path)


def test_chat_template_from_gguf() -> None:
    assert chat_template_from_gguf({"tokenizer.chat_template": "t"}) == "t"
    assert chat_template_from_gguf({}) is None
    with pytest.raises(ChatError):
        chat_template_from_gguf({"tokenizer.chat_template": 3})
