"""Text to ids and back: one face for every kind of tokenizer file."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import SupportsIndex

from gemma2_fast.errors import RequestError, TokenizerError
from gemma2_fast.text.backend import Backend
from gemma2_fast.text.gguf_vocab import model_from_gguf
from gemma2_fast.text.pieces import (
    BOS,
    END_OF_TURN,
    EOS,
    PAD,
    RESERVED_PATTERN,
    START_OF_TURN,
    is_marker,
    piece_to_bytes,
)
from gemma2_fast.text.sentencepiece_backend import SentencePieceBackend
from gemma2_fast.text.sentencepiece_proto import AddedToken, edit_model
from gemma2_fast.text.tokenizers_backend import TokenizersBackend
from gemma2_fast.text.utf8 import decode_utf8


class Tokenizer:
    """The ids that sentencepiece gives, whichever file they come from.

    Text becomes exactly one BOS, then its pieces. Turn markers and the other markers spelled in text become their ids
    in `encode` and ordinary pieces in `encode_content`. `<bos>` at the very start of the text is taken for the BOS
    itself; anywhere else it, `<eos>` and `<pad>` are ordinary text, as they are to sentencepiece.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._vocab_size = backend.vocab_size
        self.bos_id = self._required_id(BOS)
        self.eos_id = self._required_id(EOS)
        self.pad_id = self._required_id(PAD)
        self.start_of_turn_id = self._required_id(START_OF_TURN)
        self.end_of_turn_id = self._required_id(END_OF_TURN)
        markers = {marker: self._required_id(marker) for marker in backend.markers}
        self.control_ids = frozenset({self.bos_id, self.eos_id, self.pad_id, *markers.values()})
        literals = (re.escape(marker) for marker in sorted(markers, key=len, reverse=True))
        self._marker_pattern = re.compile("|".join((*literals, RESERVED_PATTERN)))
        self._piece_bytes: dict[int, bytes] = {}
        for marker, marker_id in markers.items():
            if marker_id in backend.encode(marker):
                raise TokenizerError(
                    f"the tokenizer file lets text turn into the marker {marker!r} unseen; refusing it"
                )

    @classmethod
    def from_file(cls, path: Path | str, *, added_tokens: Mapping[int, AddedToken] | None = None) -> Tokenizer:
        """From a tokenizer.model or a tokenizer.json; `added_tokens` are spelled over the ids of a tokenizer.model."""
        path = Path(path)
        if path.suffix == ".json":
            return cls(TokenizersBackend(path))
        if path.suffix == ".model":
            model = edit_model(path.read_bytes(), is_control=is_marker, added=added_tokens or {})
            return cls(SentencePieceBackend(model, source=str(path)))
        raise TokenizerError(
            f"{path}: expected a tokenizer.model (sentencepiece) or a tokenizer.json (tokenizers) file"
        )

    @classmethod
    def from_gguf_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        return cls(SentencePieceBackend(model_from_gguf(metadata), source="GGUF metadata"))

    @property
    def vocab_size(self) -> int:
        """The number of ids that have a piece; a model's embedding may have more rows."""
        return self._vocab_size

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        check_text(text)
        start = 0
        while text.startswith(BOS, start):
            start += len(BOS)
        ids = [self.bos_id] if add_bos or start else []
        for end, marker_end, marker_id in self._markers_in(text, start):
            ids += self._backend.encode(text[start:end])
            ids.append(marker_id)
            start = marker_end
        return ids + self._backend.encode(text[start:])

    def encode_content(self, text: str) -> list[int]:
        """Ids of text that someone else wrote: no BOS, and no marker whatever it spells."""
        check_text(text)
        return self._backend.encode(text)

    def replace_markers(self, text: str, replacement: str) -> str:
        """Every marker's spelling replaced by `replacement` formatted with its `token_id`."""
        parts = []
        start = 0
        for end, marker_end, marker_id in self._markers_in(text, 0):
            parts += [text[start:end], replacement.format(token_id=marker_id)]
            start = marker_end
        return "".join((*parts, text[start:]))

    def decode(self, ids: Iterable[SupportsIndex], *, skip_control: bool = True) -> str:
        """Text of the ids; a control id between the bytes of one character parts them, shown or not."""
        texts = []
        run = bytearray()
        for token_id in ids:
            piece = self.piece_bytes(token_id)
            if skip_control and operator.index(token_id) in self.control_ids:
                texts.append(decode_utf8(run))
                run.clear()
            else:
                run += piece
        return "".join((*texts, decode_utf8(run)))

    def piece_bytes(self, token_id: SupportsIndex) -> bytes:
        """The UTF-8 bytes of one id, which may be a part of a character; a control id's are its spelling."""
        index = self._checked_id(token_id)
        known = self._piece_bytes.get(index)
        if known is None:
            known = self._piece_bytes[index] = piece_to_bytes(self._backend.piece(index))
        return known

    def _markers_in(self, text: str, start: int) -> Iterator[tuple[int, int, int]]:
        for match in self._marker_pattern.finditer(text, start):
            marker_id = self._backend.token_id(match[0])
            if marker_id is not None:
                yield match.start(), match.end(), marker_id

    def _checked_id(self, token_id: SupportsIndex) -> int:
        try:
            index = operator.index(token_id)
        except TypeError as error:
            raise RequestError(f"a token id must be an integer, got {token_id!r}") from error
        if not 0 <= index < self._vocab_size:
            raise RequestError(
                f"token id {index} is out of range: the tokenizer has {self._vocab_size} pieces, the first of id 0"
            )
        return index

    def _required_id(self, piece: str) -> int:
        token_id = self._backend.token_id(piece)
        if token_id is None:
            raise TokenizerError(
                f"not a Gemma tokenizer: it has no piece {piece!r} among its {self._vocab_size}; "
                "take the tokenizer file from the model's own checkpoint"
            )
        return token_id


def check_text(text: object) -> None:
    """Refuses what has no UTF-8 form."""
    if not isinstance(text, str):
        raise TokenizerError(f"text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds a lone surrogate, {text[error.start]!r}, at character {error.start}: it has no UTF-8 form; "
            "decode the input properly, or with errors='replace'"
        ) from error
