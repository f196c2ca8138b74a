"""Text from ids as they come, never half a character and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Iterable
from typing import SupportsIndex

from gemma2_fast.errors import RequestError
from gemma2_fast.text.tokenizer import Tokenizer
from gemma2_fast.text.utf8 import incremental_decoder


class StreamDetokenizer:
    """`push` an id, get the text that is safe to show; `finish` gives the rest.

    All of it together is `tokenizer.decode(ids)`, up to the stop string that is complete first (of several that end at
    the same character, the longest). The work for an id is in proportion to its own characters.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Iterable[str] = (), *, skip_control: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.control_ids if skip_control else frozenset()
        self._decoder = incremental_decoder()
        # The longest first, so that the first to match at a character is the longest.
        self._scanners = sorted((_StopScanner(text) for text in _checked(stop)), key=lambda s: -len(s.text))
        self._held = ""  # the start of what may become a stop string
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stopped

    def push(self, token_id: SupportsIndex) -> str:
        piece = self._tokenizer.piece_bytes(token_id)
        if self._stopped is not None:
            return ""
        if token_id in self._skipped:
            return self._release(self._flush_bytes())
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """What was held back; nothing more comes after it."""
        if self._stopped is not None:
            return ""
        text = self._release(self._flush_bytes()) + self._held
        if self._stopped is None:
            self._restart()
        return text

    def _flush_bytes(self) -> str:
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text

    def _restart(self) -> None:
        self._held = ""
        for scanner in self._scanners:
            scanner.matched = 0

    def _release(self, text: str) -> str:
        if not self._scanners:
            return text
        pending = self._held + text
        for index, character in enumerate(text, start=len(self._held) + 1):
            for scanner in self._scanners:
                if scanner.completes(character):
                    self._stopped = scanner.text
                    self._held = ""
                    return pending[: index - len(scanner.text)]
        safe = len(pending) - max(scanner.matched for scanner in self._scanners)
        self._held = pending[safe:]
        return pending[:safe]


class _StopScanner:
    """How much of a stop string the text ends with, one character at a time (Knuth, Morris and Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = [0] * len(text)  # [i]: the longest proper border of text[:i + 1]
        border = 0
        for index in range(1, len(text)):
            while border and text[index] != text[border]:
                border = self._fallback[border - 1]
            border += text[index] == text[border]
            self._fallback[index] = border

    def completes(self, character: str) -> bool:
        while self.matched and character != self.text[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += character == self.text[self.matched]
        return self.matched == len(self.text)


def _checked(stop: Iterable[str]) -> set[str]:
    if isinstance(stop, str):
        raise RequestError(f"stop must be a list of strings, got the string {stop!r}; write [{stop!r}]")
    strings = list(stop)
    for text in strings:
        if not isinstance(text, str):
            raise RequestError(f"a stop string must be a str, got {type(text).__name__}")
        if not text:
            raise RequestError("a stop string is empty: it would stop every text before it starts; leave it out")
    return set(strings)
