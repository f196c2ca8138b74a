"""What a tokenizer library has to offer to serve as a backend."""

from __future__ import annotations

from typing import Protocol


class Backend(Protocol):
    """A vocabulary and a way to cut plain text into its pieces.

    `encode` recognises no marker: a marker's spelling comes out as ordinary pieces. Tags, newline runs and space runs
    are atoms. The text holds no lone surrogate and the ids are in range: the Tokenizer checks both.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def markers(self) -> frozenset[str]:
        """The pieces with a control role, by the file's own word or by their spelling; no reserved ones."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def piece(self, token_id: int) -> str: ...

    def token_id(self, piece: str) -> int | None: ...
