"""One request's events from the decode loop, as chunks of text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType

from gemma2_fast import _core
from gemma2_fast.errors import GenerationError
from gemma2_fast.outputs import Chunk, Generation, Timings, TokenLogprob, Usage
from gemma2_fast.sampling import ResolvedSampling, SamplingParams
from gemma2_fast.text import StreamDetokenizer, Tokenizer

TURN_SECONDS = 0.05  # how long the reader of several streams waits for one of them
WAIT_SECONDS = 60.0  # how long one wait for events lasts; the request itself has no time limit


class TokenStream(Iterator[Chunk]):
    """Chunks of one running request; the last carries the whole Generation. Closing it cancels the request."""

    def __init__(
        self,
        loop: _core.DecodeLoop,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        sampling: ResolvedSampling,
        stop_ids: frozenset[int],
        seed: int,
        tokenizer: Tokenizer | None,
        owner: object,
    ) -> None:
        self._loop = loop
        self._owner = owner  # the loop ends with the Generator, which must therefore outlive its streams
        self._params = params
        self._stop_ids = stop_ids
        self._num_prompt_tokens = len(prompt_ids)
        self._detokenizer = StreamDetokenizer(tokenizer, stop=tuple(params.stop)) if tokenizer else None
        self._num_pieces = tokenizer.vocab_size if tokenizer else 0
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._first_token_ns: int | None = None
        self._last_token_ns: int | None = None
        self._pending: list[_core.TokenEvent] = []
        self._finished = False
        self._submitted_ns = time.monotonic_ns()
        self._sequence_id = loop.submit(_core_request(prompt_ids, params, sampling, stop_ids, seed))

    def __next__(self) -> Chunk:
        if self._finished:
            raise StopIteration
        while not self._pending:
            self._pending = self._loop.wait(self._sequence_id, WAIT_SECONDS)
        return self._chunk(self._pending.pop(0))

    def close(self) -> None:
        """Cancel the request if it still runs; its cache blocks are freed before the next step."""
        if not self._finished:
            self._finished = True
            self._loop.forget(self._sequence_id)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_sequence_id"):
            self.close()

    def advance(self, timeout_s: float) -> Generation | None:
        """Take the events that come within `timeout_s`; the Generation if one of them was the last."""
        for event in self._loop.wait(self._sequence_id, timeout_s):
            generation = self._chunk(event).generation
            if self._finished:
                return generation
        return None

    def _chunk(self, event: _core.TokenEvent) -> Chunk:
        self._prompt_logprobs.extend(_logprob(row) for row in event.prompt_logprobs)
        reason = event.finish_reason
        if reason == "error":
            self._finished = True
            raise GenerationError(f"the request ended after {len(self._token_ids)} tokens: {event.message}")
        if reason == "cancelled":
            self._finished = True
            raise GenerationError(f"the request was cancelled after {len(self._token_ids)} tokens")
        text = ""
        new_ids: tuple[int, ...] = ()
        if event.token_id is not None:
            new_ids = (event.token_id,)
            text = self._append(event, is_stop=reason == "stop" and event.token_id in self._stop_ids)
            if self._detokenizer is not None and self._detokenizer.stopped is not None:
                self.close()
                reason = "stop"
        if reason is None:
            return Chunk(text, new_ids)
        self._finished = True
        if self._detokenizer is not None:
            rest = self._detokenizer.finish()
            self._texts.append(rest)
            text += rest
            if self._detokenizer.stopped is not None:
                reason = "stop"
        return Chunk(text, new_ids, self._generation(reason))

    def _append(self, event: _core.TokenEvent, is_stop: bool) -> str:
        token_id = event.token_id
        if token_id is None:
            return ""
        self._token_ids.append(token_id)
        self._last_token_ns = event.time_ns
        if self._first_token_ns is None:
            self._first_token_ns = event.time_ns
        if event.logprob is not None:
            self._logprobs.append(_logprob(event.logprob))
        if self._detokenizer is None or is_stop:
            return ""
        if token_id >= self._num_pieces:
            return ""  # a padding row of the embedding, which has no piece
        text = self._detokenizer.push(token_id)
        self._texts.append(text)
        return text

    def _generation(self, reason: str) -> Generation:
        usage = Usage(self._num_prompt_tokens, len(self._token_ids))
        first_ns = self._first_token_ns or time.monotonic_ns()
        last_ns = self._last_token_ns or first_ns
        return Generation(
            text="".join(self._texts) if self._detokenizer is not None else None,
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            logprobs=None if self._params.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=None if self._params.prompt_logprobs is None else tuple(self._prompt_logprobs),
            usage=usage,
            timings=Timings((first_ns - self._submitted_ns) / 1e6, (last_ns - first_ns) / 1e6, usage),
        )


def drain_all(streams: Sequence[TokenStream]) -> list[Generation]:
    """Read all streams side by side, so that a stop string ends its request at once. In the order of `streams`.

    One that fails does not end the others; the first failure is raised when all have ended.
    """
    done: dict[int, Generation] = {}
    failures: dict[int, GenerationError] = {}
    while len(done) + len(failures) < len(streams):
        timeout_s = TURN_SECONDS  # the first stream still running sets the pace
        for index, stream in enumerate(streams):
            if index in done or index in failures:
                continue
            try:
                generation = stream.advance(timeout_s)
            except GenerationError as error:
                failures[index] = error
                continue
            timeout_s = 0.0
            if generation is not None:
                done[index] = generation
    if failures:
        index, failure = min(failures.items())
        batch_error = GenerationError(f"request {index + 1} of {len(streams)}: {failure}")
        batch_error.completed = tuple(done.get(i) for i in range(len(streams)))
        raise batch_error
    return [done[index] for index in range(len(streams))]


def _core_request(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    sampling: ResolvedSampling,
    stop_ids: frozenset[int],
    seed: int,
) -> _core.Request:
    return _core.Request(
        token_ids=list(prompt_ids),
        sampling=_core.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k or None,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=list(params.logit_bias.items()),
            seed=seed,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            stop_token_ids=sorted(stop_ids),
        ),
        num_logprobs=params.logprobs,
        num_prompt_logprobs=params.prompt_logprobs,
    )


def _logprob(row: _core.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(row.token_id, row.logprob, tuple(row.top))
