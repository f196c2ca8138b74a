"""Bytes to text as sentencepiece does it: one U+FFFD for every byte that is not part of a character."""

from __future__ import annotations

import codecs

_ERRORS = "gemma2_fast.one_replacement_a_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_ERRORS, _replace_each_byte)


def decode_utf8(data: bytes | bytearray) -> str:
    return data.decode("utf-8", _ERRORS)


def incremental_decoder() -> codecs.IncrementalDecoder:
    """Holds back the bytes of a character that is not complete yet."""
    return codecs.getincrementaldecoder("utf-8")(_ERRORS)
