"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural-log probability under the raw distribution, and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """prefill_ms: from submission to the first new token (queueing included); decode_ms: from there to the last."""

    prefill_ms: float
    decode_ms: float
    usage: Usage

    @property
    def prefill_tokens_per_second(self) -> float:
        return _rate(self.usage.prompt_tokens, self.prefill_ms)

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed after the first new token, which the prefill yields."""
        return _rate(self.usage.completion_tokens - 1, self.decode_ms)


@dataclass(frozen=True)
class Generation:
    """token_ids: the new ids only, a stop id included; text: their text without it, None without a tokenizer.

    finish_reason: "stop" (a stop id or string) or "length". logprobs: one for each new token, when asked for;
    prompt_logprobs: one for each prompt token but the first, when asked for.
    """

    text: str | None
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[TokenLogprob, ...] | None
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Chunk:
    """A piece of a stream. `text` never splits a character and never shows a part of a stop string; it may be empty.

    The last chunk carries the whole `generation`; no other does.
    """

    text: str
    token_ids: tuple[int, ...]
    generation: Generation | None = None


def _rate(tokens: int, milliseconds: float) -> float:
    return tokens / milliseconds * 1000 if tokens > 0 and milliseconds > 0 else 0.0
