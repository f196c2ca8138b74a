"""A Generator that answers from a list, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from gemma2_fast import Chunk, Generation, SamplingParams, Timings, Usage

PIECES = ("The ", "sky ", "is ", "blue.")


def generation(text: str, prompt_tokens: int = 5) -> Generation:
    usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=4)
    return Generation(
        text=text,
        token_ids=(10, 11, 12, 13),
        finish_reason="stop",
        logprobs=None,
        prompt_logprobs=None,
        usage=usage,
        timings=Timings(prefill_ms=50.0, decode_ms=300.0, usage=usage),
    )


class FakeStream:
    """Chunks of PIECES; an exception in `interrupt_after` is raised after so many of them."""

    def __init__(self, interrupt_after: int | None, error: BaseException) -> None:
        self.closed = False
        self._chunks = self._run(interrupt_after, error)

    def _run(self, interrupt_after: int | None, error: BaseException) -> Iterator[Chunk]:
        for i, piece in enumerate(PIECES):
            if i == interrupt_after:
                raise error
            last = i == len(PIECES) - 1
            yield Chunk(piece, (10 + i,), generation("".join(PIECES)) if last else None)

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __enter__(self) -> FakeStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


class FakeTokenizer:
    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        return [2] * add_bos + [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token_id) for token_id in ids)

    def piece_bytes(self, token_id: int) -> bytes:
        return {2: b"<bos>", 255: b"\xff"}.get(token_id, chr(token_id).encode())


class FakeGenerator:
    """Stands where a command expects the class Generator; one instance serves one test."""

    def __init__(self) -> None:
        self.model: str | None = None
        self.options: dict[str, Any] = {}
        self.prompts: list[str] = []
        self.conversations: list[list[dict[str, str]]] = []
        self.params: SamplingParams | None = None
        self.streams: list[FakeStream] = []
        self.closed = False
        self.interrupt_after: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        self.load_error: BaseException | None = None
        self.tokenizer: FakeTokenizer | None = FakeTokenizer()

    def from_pretrained(self, model: str, **options: Any) -> FakeGenerator:
        self.model, self.options = model, options
        if self.load_error is not None:
            raise self.load_error
        return self

    def describe(self, model: str, **options: Any) -> Any:
        self.model, self.options = model, options
        return SimpleNamespace(
            lines=lambda: ["model  gemma2", "cache  1.00 GiB"],
            to_json=lambda: {"model": {"family": "gemma2"}},
            checkpoint=SimpleNamespace(path="m", tokenizer=self.tokenizer),
        )

    def __enter__(self) -> FakeGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def generate(self, prompt: str, params: SamplingParams) -> Generation | list[Generation]:
        self.prompts.append(prompt)
        self.params = params
        results = [generation(f"reply {i}") for i in range(params.n)]
        return results if params.n > 1 else results[0]

    def stream(self, prompt: str, params: SamplingParams) -> FakeStream:
        self.prompts.append(prompt)
        self.params = params
        return self._stream()

    def chat(self, messages: list[dict[str, str]], params: SamplingParams, *, stream: bool) -> FakeStream:
        assert stream
        self.conversations.append(messages)
        self.params = params
        return self._stream()

    def _stream(self) -> FakeStream:
        self.streams.append(FakeStream(self.interrupt_after, self.error))
        return self.streams[-1]
