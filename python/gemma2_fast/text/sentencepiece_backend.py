"""A tokenizer.model, or a model rebuilt from a GGUF file, run by the sentencepiece library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma2_fast.errors import FileFormatError
from gemma2_fast.text.pieces import UNSPELLABLE, is_reserved

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


class SentencePieceBackend:
    """`model` is a serialised ModelProto in which every marker is a control piece."""

    def __init__(self, model: bytes, *, source: str) -> None:
        from sentencepiece import SentencePieceProcessor  # a third of the package's import time if done at the top

        if not model:
            raise FileFormatError(f"{source}: the sentencepiece model is empty; download it again")
        try:
            self._processor: SentencePieceProcessor = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise FileFormatError(f"{source}: sentencepiece cannot read this model: {error}") from error
        self._vocab_size: int = self._processor.vocab_size()
        is_control: list[bool] = self._processor.is_control(list(range(self._vocab_size)))
        control = (self.piece(token_id) for token_id, found in enumerate(is_control) if found)
        self._markers = frozenset(piece for piece in control if piece not in UNSPELLABLE and not is_reserved(piece))

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def markers(self) -> frozenset[str]:
        return self._markers

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def piece(self, token_id: int) -> str:
        piece: str = self._processor.id_to_piece(token_id)
        return piece

    def token_id(self, piece: str) -> int | None:
        token_id: int = self._processor.piece_to_id(piece)
        return token_id if self.piece(token_id) == piece else None  # an unknown piece gets the id of <unk>
