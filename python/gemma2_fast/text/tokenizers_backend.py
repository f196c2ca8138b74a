"""A tokenizer.json run by the tokenizers library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma2_fast.errors import FileFormatError
from gemma2_fast.text.pieces import SPACE, UNSPELLABLE, is_marker, is_reserved

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# Atoms of the sentencepiece model that the first published tokenizer.json has in its vocabulary but not among its added
# tokens, so that the library would build them by merging, or not at all.
_UNLISTED_ATOMS = ("[toxicity=0]", *("\t" * length for length in range(2, 32)))


class TokenizersBackend:
    """The file's own normaliser turns spaces into "▁" only after the added tokens "▁▁", "▁▁▁" … were looked for, which
    gives runs of more than 31 spaces, and a literal "▁", other ids than the models were trained with. Doing it first,
    as sentencepiece does, gives sentencepiece's ids.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import AddedToken, Tokenizer

        data = path.read_bytes()
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises the base class
            raise FileFormatError(f"{path}: the tokenizers library cannot read this file: {error}") from error
        self._tokenizer.no_truncation()  # a saved limit would cut prompts silently
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        markers = {token.content for token in added.values() if token.special or is_marker(token.content)}
        # Special tokens are those that encode_special_tokens leaves alone.
        self._tokenizer.add_special_tokens(
            [AddedToken(text, normalized=False, special=True) for text in sorted(markers)]
        )
        self._tokenizer.encode_special_tokens = True
        atoms = (text for text in _UNLISTED_ATOMS if self.token_id(text) is not None)
        self._tokenizer.add_tokens([AddedToken(text, normalized=False) for text in atoms])
        self._markers = frozenset(text for text in markers if text not in UNSPELLABLE and not is_reserved(text))
        self._vocab_size = max(self._tokenizer.get_vocab_size(), max(added, default=-1) + 1)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def markers(self) -> frozenset[str]:
        return self._markers

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text.replace(" ", SPACE), add_special_tokens=False).ids
        return ids

    def piece(self, token_id: int) -> str:
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return "" if piece is None else piece  # an id that the file leaves out between two others

    def token_id(self, piece: str) -> int | None:
        token_id: int | None = self._tokenizer.token_to_id(piece)
        return token_id
