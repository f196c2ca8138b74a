"""The little of sentencepiece's ModelProto wire format that we read and write, without a protobuf library.

ModelProto: pieces = 1 (repeated: piece = 1 string, score = 2 float, type = 3 enum), trainer_spec = 2,
normalizer_spec = 3; after google/sentencepiece src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import NamedTuple

from gemma2_fast.errors import FileFormatError


class PieceType(IntEnum):
    """The numbers that both ModelProto and GGUF's token_type use."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class AddedToken(NamedTuple):
    """A token that a checkpoint adds to, or renames in, its sentencepiece model."""

    text: str
    is_control: bool


_PIECES_TAG = 0x0A
_WIRE_VARINT, _WIRE_64, _WIRE_BYTES, _WIRE_32 = 0, 1, 2, 5
_PIECE_TAIL = struct.Struct("<BfBB")
_USER_DEFINED_FIELD = bytes([3 << 3 | _WIRE_VARINT, PieceType.USER_DEFINED])


def build_model(pieces: Iterable[tuple[str, float, PieceType]], *, unknown_id: int) -> bytes:
    """A BPE model with byte fallback that adds and removes no whitespace: Gemma's settings."""
    body = bytearray()
    for text, score, piece_type in pieces:
        body += _piece_entry(text, score, piece_type)
    trainer = _varint_field(3, 2) + _varint_field(35, 1) + _varint_field(40, unknown_id)  # BPE, byte_fallback, unk_id
    normalizer = _bytes_field(1, b"identity") + _varint_field(3, 0) + _varint_field(4, 0) + _varint_field(5, 1)
    return bytes(body + _bytes_field(2, trainer) + _bytes_field(3, normalizer))


def edit_model(model: bytes, *, is_control: Callable[[str], bool], added: Mapping[int, AddedToken]) -> bytes:
    """The model with its markers made control pieces, and with the added tokens spelled over their ids or appended."""
    edited = bytearray()
    copied = 0
    count = 0
    for entry, start, end in _piece_spans(model):
        # sentencepiece writes the type last; a Tokenizer verifies that no marker was missed
        user_defined = model[end - 2 : end] == _USER_DEFINED_FIELD
        token = added.get(count)
        if token is not None or user_defined:
            text = _piece_text(model, start, end)
            respelled = token is not None and token.text != text and user_defined
            if token is None or not respelled:
                token = AddedToken(text, is_control(text) or (token is not None and token.is_control))
            if user_defined and (respelled or token.is_control):
                edited += model[copied:entry] + _added_entry(token)
                copied = end
        count += 1
    edited += model[copied:]
    for token_id in sorted(token_id for token_id in added if token_id >= count):
        if token_id != count:
            raise FileFormatError(
                f"the added token {added[token_id].text!r} has id {token_id}, but the next free id is {count}; "
                "remove the checkpoint's tokenizer.model to use its tokenizer.json"
            )
        edited += _added_entry(added[token_id])
        count += 1
    return bytes(edited)


def _added_entry(token: AddedToken) -> bytes:
    return _piece_entry(token.text, 0.0, PieceType.CONTROL if token.is_control else PieceType.USER_DEFINED)


def _piece_spans(model: bytes) -> Iterable[tuple[int, int, int]]:
    """(where the field starts, where its body starts, where it ends) of every piece."""
    position = 0
    while position < len(model):
        field = position
        if model[field] == _PIECES_TAG and field + 1 < len(model) and model[field + 1] < 0x80:  # nearly all fields
            position = field + 2 + model[field + 1]
            if position <= len(model):
                yield field, field + 2, position
                continue
            position = field
        tag, position = _read_varint(model, position)
        wire = tag & 7
        if wire == _WIRE_BYTES:
            length, position = _read_varint(model, position)
        elif wire == _WIRE_VARINT:
            length, (_, after) = 0, _read_varint(model, position)
            position = after
        elif wire in (_WIRE_32, _WIRE_64):
            length = 4 if wire == _WIRE_32 else 8
        else:
            raise FileFormatError(f"not a sentencepiece model: byte {field} starts a field of unknown wire type {wire}")
        if position + length > len(model):
            raise FileFormatError(
                f"not a whole sentencepiece model: the field at byte {field} ends at byte {position + length}, "
                f"the file has {len(model)}; download it again"
            )
        if tag == _PIECES_TAG:
            yield field, position, position + length
        position += length


def _piece_text(model: bytes, start: int, end: int) -> str:
    if start == end or model[start] != _PIECES_TAG:  # the piece string, too, is field 1
        raise FileFormatError(f"not a sentencepiece model: the piece at byte {start} does not start with its text")
    length, position = _read_varint(model, start + 1)
    if position + length > end:
        raise FileFormatError(f"not a sentencepiece model: the text of the piece at byte {start} passes its end")
    try:
        return model[position : position + length].decode()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"not a sentencepiece model: the piece at byte {start} is not UTF-8") from error


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise FileFormatError(f"not a sentencepiece model: the number at byte {position} has no end")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3 | _WIRE_VARINT) + _varint(value)


def _bytes_field(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | _WIRE_BYTES) + _varint(len(body)) + body


def _piece_entry(text: str, score: float, piece_type: PieceType) -> bytes:
    encoded = text.encode()
    tail = _PIECE_TAIL.pack(2 << 3 | _WIRE_32, score, 3 << 3 | _WIRE_VARINT, piece_type)
    if len(encoded) < 0x80 - 2 - len(tail):  # both lengths in one byte: half the time of loading a GGUF vocabulary
        return bytes((_PIECES_TAG, 2 + len(encoded) + len(tail), _PIECES_TAG, len(encoded))) + encoded + tail
    return _bytes_field(1, _bytes_field(1, encoded) + tail)
