"""How the next token is chosen and when generation ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any

from gemma2_fast.errors import RequestError

DEFAULT_MAX_TOKENS = 256
MAX_LOGPROBS = 64
MAX_SEED = 2**64 - 1
MAX_NUMBER = 1e30  # far beyond any use, and finite as a float32

_DEFAULTS: dict[str, Any] = {
    "top_k": None,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "max_tokens": DEFAULT_MAX_TOKENS,
    "min_tokens": 0,
}

# generation_config.json keys that are sampling parameters of ours, by our name.
_CHECKPOINT_KEYS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
}


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of one request; what is None comes from the checkpoint's generation_config.json, else a default.

    temperature: 0 is greedy, which is also the default unless the checkpoint says `do_sample`.
    top_k, top_p, min_p: applied in this order, after the temperature; top_k 0, top_p 1 and min_p 0 keep every token.
    repetition_penalty: over prompt and output, 1 is none. presence_penalty, frequency_penalty: over the output, 0 is
    none.
    logit_bias: token id → value added to its logit.
    seed: the same seed gives the same tokens whatever else runs; None draws one.
    max_tokens (or max_new_tokens): new tokens at most, 256 by default. min_tokens: no stop id before so many.
    stop: strings that end the text, which does not include them. stop_token_ids: ids that end it, besides the model's
    own unless ignore_eos. n: samples a prompt. logprobs, prompt_logprobs: how many alternatives to report beside each
    new or prompt token; 0 reports the token alone.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    max_new_tokens: InitVar[int | None] = None
    min_tokens: int | None = None
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self, max_new_tokens: int | None) -> None:
        if max_new_tokens is not None:
            if self.max_tokens not in (None, max_new_tokens):
                raise RequestError(
                    f"max_tokens ({self.max_tokens}) and max_new_tokens ({max_new_tokens}) differ; give one"
                )
            object.__setattr__(self, "max_tokens", max_new_tokens)
        if not isinstance(self.stop, str | tuple | list) or not isinstance(self.stop_token_ids, tuple | list):
            raise RequestError("stop must be a string or a list of strings, and stop_token_ids a list of ids")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if any(not isinstance(text, str) or not text for text in stop):
            raise RequestError(f"stop strings must not be empty, got {stop!r}")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))

        _check_number("temperature", self.temperature, 0, math.inf)
        _check_int("top_k", self.top_k, 0)
        _check_number("top_p", self.top_p, 0, 1, above=True)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, 0, math.inf, above=True)
        _check_number("presence_penalty", self.presence_penalty, -math.inf, math.inf)
        _check_number("frequency_penalty", self.frequency_penalty, -math.inf, math.inf)
        _check_int("seed", self.seed, 0, MAX_SEED)
        _check_int("max_tokens", self.max_tokens, 0)
        _check_int("min_tokens", self.min_tokens, 0)
        _check_int("n", self.n, 1, 1024)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias id", token_id, 0)
            _check_number(f"logit_bias[{token_id}]", bias, -math.inf, math.inf)

    def updated(self, changes: Mapping[str, Any]) -> SamplingParams:
        """These parameters with `changes`; RequestError for a name that is not one of them."""
        known = [*(item.name for item in fields(self)), "max_new_tokens"]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            raise RequestError(f"unknown sampling parameters: {', '.join(unknown)}; known: {', '.join(known)}")
        if "max_new_tokens" in changes and "max_tokens" not in changes:
            changes = {"max_tokens": None, **changes}
        return replace(self, **{"max_new_tokens": None, **changes}) if changes else self

    def resolved(self, generation_config: Mapping[str, Any]) -> ResolvedSampling:
        """Every None filled from generation_config.json, else by the default."""
        do_sample = generation_config.get("do_sample", False) is True
        values: dict[str, Any] = {**_DEFAULTS, "temperature": 1.0 if do_sample else 0.0}
        for ours, theirs in _CHECKPOINT_KEYS.items():
            value = generation_config.get(theirs)
            if value is not None and (do_sample or ours != "temperature"):
                values[ours] = value
        values |= {name: getattr(self, name) for name in values if getattr(self, name) is not None}
        SamplingParams(**values)  # refuses what the file may have said
        return ResolvedSampling(**values)


@dataclass(frozen=True)
class ResolvedSampling:
    """The parameters of SamplingParams that a checkpoint can supply, with no question left open."""

    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int
    min_tokens: int


def _check_number(name: str, value: Any, low: float, high: float, above: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_NUMBER:
        raise RequestError(f"{name} must be a finite number, got {value!r:.100}")
    if value < low or value > high or (above and value == low):
        bounds = f"above {low:g}" if above else f"at least {low:g}"
        if high < math.inf:
            bounds += f" and at most {high:g}"
        raise RequestError(f"{name} must be {bounds}, got {value!r}")


def _check_int(name: str, value: Any, low: int, high: int | None = None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} must be a whole number {bounds}, got {value!r}")
