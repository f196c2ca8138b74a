"""What a command says about a finished generation."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from gemma2_fast import Generation


def print_timings(generations: Sequence[Generation], load_seconds: float | None = None) -> None:
    """One line on stderr, so that stdout stays the text alone."""
    prompt_tokens = generations[0].usage.prompt_tokens
    new_tokens = sum(generation.usage.completion_tokens for generation in generations)
    timings = generations[0].timings
    parts = [] if load_seconds is None else [f"load {load_seconds:.2f} s"]
    parts.append(f"prompt {_rate(prompt_tokens, timings.prefill_ms, timings.prefill_tokens_per_second)}")
    if len(generations) == 1:
        parts.append(f"reply {_rate(new_tokens, timings.decode_ms, timings.decode_tokens_per_second)}")
    else:
        parts.append(f"{len(generations)} replies {new_tokens} tokens")
    parts.append(f"ended by {generations[0].finish_reason}")
    print(f"[{' · '.join(parts)}]", file=sys.stderr)


def _rate(tokens: int, milliseconds: float, tokens_per_second: float) -> str:
    rate = f", {tokens_per_second:.1f} tokens/s" if tokens_per_second else ""
    return f"{tokens} tokens in {milliseconds / 1000:.2f} s{rate}"
