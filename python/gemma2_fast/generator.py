"""The face of the package: a loaded model that generates, chats and scores."""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.description import Description
from gemma2_fast.engine.engine import start_engine
from gemma2_fast.engine.memory import free_memory_bytes
from gemma2_fast.engine.options import EngineOptions, EnginePlan, plan_engine
from gemma2_fast.errors import (
    BackendError,
    CapacityError,
    ConfigError,
    GenerationError,
    RequestError,
    TokenizerError,
)
from gemma2_fast.outputs import Generation
from gemma2_fast.sampling import SamplingParams
from gemma2_fast.spec import ModelSpec
from gemma2_fast.stream import WAIT_SECONDS, TokenStream, drain_all
from gemma2_fast.text import (
    TOKENIZER_FILES,
    ChatFormat,
    Tokenizer,
    chat_template_from_gguf,
    find_chat_template,
    find_tokenizer,
)
from gemma2_fast.weights.demo import DEMO_MODEL, demo_model_path
from gemma2_fast.weights.hub import resolve_model
from gemma2_fast.weights.load import Checkpoint, load_checkpoint
from gemma2_fast.weights.prefault import prefault

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

_HUB_DEFAULTS: dict[str, Any] = {
    "revision": None,
    "token": None,
    "cache_dir": None,
    "local_files_only": False,
    "progress": False,
}


class Generator:
    """A Gemma model ready to run. Safe to call from several threads; close it, or use it as a context manager.

    backend: "auto", "cpu", "cuda" or "reference" (PyTorch); plan: every choice that was made; spec: the model as data.
    """

    def __init__(self, checkpoint: Checkpoint, plan: EnginePlan, progress: bool = False) -> None:
        self.plan = plan
        self._checkpoint = checkpoint
        self._tokenizer, template = load_text(checkpoint)
        self._chat_format = None if self._tokenizer is None else ChatFormat(template, self._tokenizer)
        try:
            SamplingParams().resolved(checkpoint.generation_config)
        except RequestError as error:
            raise ConfigError(f"{checkpoint.path / 'generation_config.json'}: {error}") from None
        self._loop = start_engine(plan, checkpoint.weights, progress)
        self._finalizer = weakref.finalize(self, self._loop.close)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        backend: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        activations: str = "auto",
        kv_dtype: str = "auto",
        max_seq_len: int | None = None,
        max_batch_size: int = 8,
        max_step_tokens: int | None = None,
        kv_cache_gib: float | None = None,
        num_threads: int | None = None,
        sliding_window: int | None = None,
        instruction_set: str = "auto",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        progress: bool = True,
    ) -> Generator:
        """Load a hub id, a local directory, a .gguf file, or "gemma-3-270m" (which ships with the [demo] extra).

        backend: "auto" | "cpu" | "cuda" | "reference". dtype: "auto" (the checkpoint's own) | "float32" | "bfloat16".
        quantization: None (as stored) | "int8" | "int4", made of unquantised weights while they are loaded.
        activations: "auto" ("int8" for products with quantised weights on the CPU) | "float32" | "int8".
        kv_dtype: "auto" (follows dtype, bfloat16 for "int8" and "int4" weights) | "float32" | "bfloat16" | "int8".
        backend="cuda" computes in bfloat16 with sums in float32, and keeps keys and values in bfloat16; weights of
        formats other than "int8" and "int4" become bfloat16.
        max_seq_len: tokens a sequence may reach, the model's own limit by default; more only where no layer sees
        every token.
        max_batch_size: sequences that run at once. max_step_tokens: tokens one step computes, by default 512,
        on a GPU 2048. kv_cache_gib: memory for keys and values, by default at most half of what is free, on a GPU 90 %.
        num_threads: all processors by default. sliding_window: keys a windowed layer sees, as trained by default.
        instruction_set: "auto" | "avx512_amx" | "avx512_vnni" | "avx_vnni" | "avx2" | "scalar".
        revision, token, cache_dir, local_files_only: for the hub. progress: bars on a terminal.

        Raises classes of gemma2_fast.errors, or OSError for a path that cannot be read.
        """
        options = EngineOptions(
            backend=backend,
            dtype=dtype,
            quantization=quantization,
            activations=activations,
            kv_dtype=kv_dtype,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            max_step_tokens=max_step_tokens,
            kv_cache_gib=kv_cache_gib,
            num_threads=num_threads,
            sliding_window=sliding_window,
            instruction_set=instruction_set,
        )
        checkpoint = _open(model, revision, token, cache_dir, local_files_only, progress)
        plan = plan_engine(checkpoint.spec, checkpoint.matrix_formats, options)
        if plan.quantization is None:
            prefault(checkpoint.weights, progress)
        return cls(checkpoint, plan, progress)

    @classmethod
    def describe(cls, model: str | os.PathLike[str], **options: Any) -> Description:
        """What from_pretrained would build with the same arguments, or why it could not. Allocates nothing of it."""
        hub = {name: options.pop(name) for name in _HUB_DEFAULTS if name in options}
        engine_options = EngineOptions.from_keywords(options)
        checkpoint = _open(model, **{**_HUB_DEFAULTS, **hub})
        try:
            plan = plan_engine(checkpoint.spec, checkpoint.matrix_formats, engine_options)
        except (BackendError, CapacityError) as error:
            return Description(checkpoint, None, str(error))
        return Description(checkpoint, plan, None)

    @property
    def spec(self) -> ModelSpec:
        return self.plan.spec

    @property
    def backend(self) -> str:
        return self.plan.backend

    @property
    def tokenizer(self) -> Tokenizer:
        """TokenizerError, naming the files looked for, when the checkpoint has none."""
        if self._tokenizer is None:
            in_gguf = self._checkpoint.gguf_metadata is not None
            looked_for = "tokenizer.ggml.tokens" if in_gguf else ", ".join(TOKENIZER_FILES)
            raise TokenizerError(f"{self._checkpoint.path} has no tokenizer (looked for {looked_for}); give token ids")
        return self._tokenizer

    @overload
    def generate(self, prompts: str, params: SamplingParams | None = None, **changes: Any) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt] | Sequence[int], params: SamplingParams | None = None, **changes: Any
    ) -> Any: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **changes: Any
    ) -> Generation | list[Generation]:
        """Generate for one prompt (text or ids) or a list of prompts, which run together.

        Returns a Generation for one prompt and a list for a list; with n > 1 always a list, n for each prompt in turn.
        """
        prompts_ids, single = self._batch_ids(prompts)
        chosen = self._params(params, changes)
        streams: list[TokenStream] = []
        try:
            for prompt_ids in prompts_ids:
                seed = _seed(chosen)
                streams += [self._stream(prompt_ids, chosen, seed + sample) for sample in range(chosen.n)]
            generations = drain_all(streams)
        finally:
            for stream in streams:
                stream.close()
        return generations[0] if single and chosen.n == 1 else generations

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **changes: Any) -> TokenStream:
        """An iterator of Chunk, whose last holds the Generation. Closing it, or leaving its `with`, cancels."""
        chosen = self._params(params, changes)
        if chosen.n != 1:
            raise RequestError(f"a stream has one sample, got n={chosen.n}; call stream once for each")
        return self._stream(self._prompt_ids(prompt), chosen, _seed(chosen))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        strict_system: bool = False,
        **changes: Any,
    ) -> Any:
        """Reply to a conversation of {"role": ..., "content": ...} messages in the model's turn format.

        Returns what generate returns, or with stream=True what stream returns. A system message is put at the start of
        the first user turn, or refused with strict_system=True. Markers inside a content never become control ids.
        """
        tokenizer, chat_format = self.tokenizer, self._chat_format
        if chat_format is None:
            raise TokenizerError(f"{self._checkpoint.path} has no chat format")
        prompt_ids = chat_format.render(messages, strict_system=strict_system)
        chosen = self._params(params, changes)
        end_of_turn = () if tokenizer.end_of_turn_id is None else (tokenizer.end_of_turn_id,)
        if not chosen.ignore_eos:
            chosen = chosen.updated({"stop_token_ids": (*chosen.stop_token_ids, *end_of_turn)})
        return self.stream(prompt_ids, chosen) if stream else self.generate(prompt_ids, chosen)

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """Raw (capped) next-token logits of every token, float32 [T, V]."""
        prompt_ids = self._prompt_ids(prompt)
        self._check_length(prompt_ids)
        num_bytes = len(prompt_ids) * self.spec.vocab_size * 4
        if num_bytes > free_memory_bytes():
            raise CapacityError(
                f"the logits of {len(prompt_ids)} tokens take {num_bytes / 2**30:.1f} GiB, more than is free; use score"
            )
        out = np.empty((len(prompt_ids), self.spec.vocab_size), dtype=np.float32)
        self._run_prompt(_core.Request(token_ids=prompt_ids, sampling=_no_tokens(), logits_out=out))
        return out

    def score(self, prompt: Prompt) -> NDArray[np.float32]:
        """Natural-log probability of every token but the first given those before it, float32 [T - 1]."""
        prompt_ids = self._prompt_ids(prompt)
        self._check_length(prompt_ids)
        events = self._run_prompt(_core.Request(token_ids=prompt_ids, sampling=_no_tokens(), num_prompt_logprobs=0))
        return np.array([row.logprob for event in events for row in event.prompt_logprobs], dtype=np.float32)

    def stats(self) -> dict[str, Any]:
        """Counters of the decode loop: running and waiting requests, free cache blocks, preemptions, steps, tokens."""
        return self._loop.stats()

    def close(self) -> None:
        """End every request and stop the decode loop. Calling it again does nothing."""
        self._finalizer()

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, prompt_ids: Sequence[int], params: SamplingParams, seed: int) -> TokenStream:
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids.update(self._checkpoint.eos_ids)
        tokenizer = self._tokenizer
        if tokenizer is None and params.stop:
            raise TokenizerError("stop strings need a tokenizer, which this checkpoint lacks; use stop_token_ids")
        sampling = params.resolved(self._checkpoint.generation_config)
        return TokenStream(self._loop, prompt_ids, params, sampling, frozenset(stop_ids), seed % 2**64, tokenizer, self)

    def _params(self, params: SamplingParams | None, changes: Mapping[str, Any]) -> SamplingParams:
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"params must be a SamplingParams, got {type(params).__name__}")
        base = SamplingParams() if params is None else params
        return base.updated(changes)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return _checked_ids(prompt)
        if not prompt:
            raise RequestError("the prompt is empty; give text or at least one token id")
        ids = self.tokenizer.encode(prompt)
        if max(ids) >= self.spec.vocab_size:
            raise TokenizerError(
                f"the tokenizer turns the prompt into id {max(ids)}, but the model has {self.spec.vocab_size} rows: "
                f"they are of different models; fetch the tokenizer that belongs to {self._checkpoint.path}"
            )
        return ids

    def _batch_ids(self, prompts: Any) -> tuple[list[list[int]], bool]:
        """Ids of every prompt, and whether a single prompt was given rather than a list of them."""
        if isinstance(prompts, list | tuple) and any(isinstance(p, str | list | tuple | np.ndarray) for p in prompts):
            return [self._prompt_ids(prompt) for prompt in prompts], False
        return [self._prompt_ids(prompts)], True

    def _check_length(self, prompt_ids: Sequence[int]) -> None:
        limit = self.plan.cache.max_seq_len
        if len(prompt_ids) > limit:
            raise RequestError(
                f"{len(prompt_ids)} tokens are more than max_seq_len {limit}; shorten the text or raise it"
            )

    def _run_prompt(self, request: _core.Request) -> list[_core.TokenEvent]:
        sequence_id = self._loop.submit(request)
        events: list[_core.TokenEvent] = []
        try:
            while not events or events[-1].finish_reason is None:
                events += self._loop.wait(sequence_id, WAIT_SECONDS)
        except BaseException:
            self._loop.forget(sequence_id)
            raise
        if events[-1].finish_reason != "length":
            raise GenerationError(f"the prompt could not be evaluated: {events[-1].message}")
        return events


def _open(
    model: str | os.PathLike[str],
    revision: str | None,
    token: str | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    progress: bool,
) -> Checkpoint:
    path: Path
    if str(model) == DEMO_MODEL and not Path(model).exists():
        path = demo_model_path(progress=progress)
    else:
        path = resolve_model(
            model,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            progress=progress,
        )
    return load_checkpoint(path)


def load_text(checkpoint: Checkpoint) -> tuple[Tokenizer | None, str | None]:
    """The checkpoint's tokenizer and chat template, as far as it has them."""
    metadata = checkpoint.gguf_metadata
    if metadata is None:
        return find_tokenizer(checkpoint.path), find_chat_template(checkpoint.path)
    if "tokenizer.ggml.tokens" not in metadata:
        return None, None
    return Tokenizer.from_gguf_metadata(metadata), chat_template_from_gguf(metadata)


def _checked_ids(ids: Any) -> list[int]:
    allowed = isinstance(ids, list | tuple | range | np.ndarray)
    if not allowed or any(isinstance(token_id, bool | np.bool_) for token_id in ids):
        raise RequestError(f"a prompt is text or a list of token ids (whole numbers), got {type(ids).__name__}")
    try:
        return [operator.index(token_id) for token_id in ids]
    except TypeError:
        raise RequestError("a prompt is text or a list of token ids (whole numbers)") from None


def _seed(params: SamplingParams) -> int:
    return params.seed if params.seed is not None else int.from_bytes(os.urandom(8))


def _no_tokens() -> _core.SamplingParams:
    """Parameters of a request that only evaluates its prompt."""
    return _core.SamplingParams(max_tokens=0)
