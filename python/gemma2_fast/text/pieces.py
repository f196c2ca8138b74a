"""What a piece of the vocabulary means, told from its spelling alone, so that every backend agrees."""

from __future__ import annotations

import re

PAD = "<pad>"
EOS = "<eos>"
BOS = "<bos>"
UNKNOWN = "<unk>"
START_OF_TURN = "<start_of_turn>"
END_OF_TURN = "<end_of_turn>"

SPACE = "\u2581"  # sentencepiece's stand-in for a space
UNKNOWN_SURFACE = " \u2047 "  # what sentencepiece decodes the unknown piece to

# Never recognised in text: sentencepiece, which the models were trained with, cuts their spelling into ordinary pieces.
UNSPELLABLE = frozenset({PAD, EOS, BOS, UNKNOWN})

# Recognised in a prompt, refused to the content of a chat message.
_MARKERS = frozenset(
    {
        START_OF_TURN,
        END_OF_TURN,
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|file_separator|>",
        "<mask>",
        "<2mass>",
        "[@BOS@]",
        "[multimodal]",
    }
)

# Fine-tuned models give these control roles of their own, so content may not produce them either.
RESERVED_PATTERN = r"<unused\d+>"
_RESERVED = re.compile(RESERVED_PATTERN)
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def is_reserved(piece: str) -> bool:
    return _RESERVED.fullmatch(piece) is not None


def is_marker(piece: str) -> bool:
    """A piece with a control role, that a prompt may spell and chat content may not."""
    return piece[:1] in ("<", "[") and (piece in _MARKERS or is_reserved(piece))


def piece_to_bytes(piece: str) -> bytes:
    """The UTF-8 bytes that a piece stands for; a byte piece stands for one, which may be half a character."""
    if piece == UNKNOWN:
        return UNKNOWN_SURFACE.encode()
    if byte := _BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    return piece.replace(SPACE, " ").encode()
