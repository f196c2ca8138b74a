from __future__ import annotations

import pytest
from sentencepiece import SentencePieceProcessor

from gemma2_fast.text import Tokenizer
from tests.text.vocabulary_files import ADDED_IN_JUNE, MODEL_FILE, gguf_metadata, write_tokenizer_json


@pytest.fixture(scope="session")
def oracle() -> SentencePieceProcessor:
    """The official model in the official library."""
    return SentencePieceProcessor(model_file=str(MODEL_FILE))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(MODEL_FILE)


@pytest.fixture(scope="session")
def json_tokenizer(oracle: SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    write_tokenizer_json(oracle, path)
    return Tokenizer.from_file(path)


@pytest.fixture(scope="session")
def gguf_tokenizer(oracle: SentencePieceProcessor) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(gguf_metadata(oracle, ADDED_IN_JUNE))


@pytest.fixture(params=["tokenizer", "json_tokenizer", "gguf_tokenizer"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found
