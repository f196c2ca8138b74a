"""The vocabulary arrays of a GGUF file, made into the sentencepiece model they were converted from.

llama.cpp's converter gives every added token score -1000 and the type control or user-defined, writes the spaces of
user-defined pieces as spaces, and passes user-defined pieces that are not added tokens off as normal ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gemma2_fast.errors import FileFormatError, TokenizerError
from gemma2_fast.text.pieces import BOS, EOS, PAD, SPACE, UNKNOWN, is_marker
from gemma2_fast.text.sentencepiece_proto import PieceType, build_model

_TOKENS = "tokenizer.ggml.tokens"
_SCORES = "tokenizer.ggml.scores"
_TYPES = "tokenizer.ggml.token_type"


def model_from_gguf(metadata: Mapping[str, object]) -> bytes:
    """A serialised sentencepiece ModelProto, with every marker a control piece."""
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind != "llama":
        raise TokenizerError(
            f"the GGUF metadata's tokenizer.ggml.model is {kind!r}, expected 'llama', the sentencepiece vocabulary of "
            "Gemma files; convert the model again with its tokenizer.model beside it"
        )
    texts = [text if isinstance(text, str) else _text(text) for text in _array(metadata, _TOKENS)]
    stored_scores, stored_types = _array(metadata, _SCORES), _array(metadata, _TYPES)
    try:
        scores = np.asarray(stored_scores, dtype=np.float64).tolist()
        types = np.asarray(stored_types, dtype=np.int64).tolist()
    except (TypeError, ValueError, OverflowError) as error:
        raise FileFormatError(f"{_SCORES} and {_TYPES} must be arrays of numbers: {error}") from None
    if not len(texts) == len(scores) == len(types):
        raise FileFormatError(
            f"GGUF vocabulary arrays differ in length: {_TOKENS} {len(texts)}, {_SCORES} {len(scores)}, "
            f"{_TYPES} {len(types)}; the file is damaged"
        )
    if UNKNOWN not in texts:
        raise TokenizerError(f"{_TOKENS} has no {UNKNOWN!r} among its {len(texts)} pieces: not a Gemma vocabulary")
    return build_model(_original_pieces(texts, scores, types), unknown_id=texts.index(UNKNOWN))


def _original_pieces(
    texts: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> Iterator[tuple[str, float, PieceType]]:
    for token_id, (text, score, number) in enumerate(zip(texts, scores, types, strict=True)):
        if number == PieceType.NORMAL and score:
            yield text, score, PieceType.NORMAL
            continue
        try:
            piece_type = PieceType(number)
        except ValueError as error:
            raise FileFormatError(f"{_TYPES}[{token_id}] is {number}, expected 1 to 6; the file is damaged") from error
        if text == UNKNOWN:
            piece_type = PieceType.UNKNOWN
        elif text in (PAD, EOS, BOS) or is_marker(text):
            piece_type = PieceType.CONTROL
        elif piece_type is PieceType.NORMAL and score == 0 and not _is_first_rank(token_id, scores):
            piece_type = PieceType.USER_DEFINED
        if piece_type is PieceType.USER_DEFINED:
            text = text.replace(" ", SPACE)
        yield text, score if piece_type is PieceType.NORMAL else 0.0, piece_type


def _is_first_rank(token_id: int, scores: Sequence[float]) -> bool:
    """Normal pieces score 0, -1, -2 … in the order of their ids, so the one that heads them has score 0 rightly."""
    return token_id + 1 < len(scores) and scores[token_id + 1] == -1


def _array(metadata: Mapping[str, object], key: str) -> Sequence[object]:
    values = metadata.get(key)
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or not values:
        raise TokenizerError(f"the GGUF metadata has no array {key}; the file carries no tokenizer that can be used")
    return values


def _text(piece: object) -> str:
    if isinstance(piece, bytes):
        return piece.decode("utf-8", "replace")
    raise FileFormatError(f"{_TOKENS} holds a {type(piece).__name__}, expected strings; the file is damaged")
