"""Peers of the whole engine in PyTorch: one compiled decode step each, driven token by token as ours is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import transformers

from gemma2_fast.bench import shapes
from gemma2_fast.bench.gpu.plain import PlainGemma2, on
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.names import hf_names
from gemma2_fast.weights.tensor import Tensor

COMPILE_MODE = "reduce-overhead"
HF_PREFIX = "model."


class Decoder(Protocol):
    """A model after `context` tokens. Every token comes to the host, as ours do."""

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """[V] float32 after these tokens, from an empty cache."""

    def decode(self, steps: int) -> list[float]:
        """Seconds of each step from `context` on."""


class CompiledPlain:
    """PlainGemma2 under torch.compile. Its cache holds random keys and values of the whole context, so that no prompt
    need be evaluated: a step takes as long."""

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, Tensor], context: int, steps: int, device: torch.device
    ) -> None:
        import torch._inductor.config as inductor

        inductor.coordinate_descent_tuning = True  # block sizes of its kernels are searched, not guessed
        self._model = PlainGemma2(spec, weights, context + steps, device)
        self._next = torch.compile(self._next_token, mode=COMPILE_MODE, fullgraph=True, dynamic=False)
        self._context = context
        self._token = torch.zeros(1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        for position, token in enumerate(ids):
            self._set(token, position)
            logits: torch.Tensor = self._model(self._token, self._position)
        return logits

    def decode(self, steps: int) -> list[float]:
        self._set(5, self._context)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            self._token.copy_(self._next(self._token, self._position))
            self._position += 1
            self._token.item()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _next_token(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._model(token, position)
        return logits.argmax(0, keepdim=True)

    def _set(self, token: int, position: int) -> None:
        self._token.fill_(token)
        self._position.fill_(position)


class CompiledTransformers:
    """transformers' own Gemma 2, with its soft caps and window ("eager" attention), static cache and torch.compile."""

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, Tensor], size: str, context: int, steps: int, device: torch.device
    ) -> None:
        settings: dict[str, Any] = {**shapes.config(size), "attn_implementation": "eager"}
        config = transformers.Gemma2Config(**settings)
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                self._model = transformers.Gemma2ForCausalLM(config)
        finally:
            torch.set_default_dtype(previous)
        names = hf_names(spec, ())
        state = {names[name]: on(device, tensor) for name, tensor in weights.items()}
        missing, unexpected = self._model.load_state_dict(state, strict=False, assign=True)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"transformers names its weights otherwise: {missing[:3]}, {unexpected[:3]}")
        self._model.tie_weights()
        self._model.train(False)
        self._cache: Any = transformers.StaticCache(config=config, max_cache_len=context + steps)
        self._next = torch.compile(self._next_token, mode=COMPILE_MODE)
        self._context = context
        self._device = device

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        self._cache.reset()
        return self._forward(self._ids(ids), self._positions(0, len(ids))).float()

    def decode(self, steps: int) -> list[float]:
        self._cache.reset()
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(3, self._model.config.vocab_size, (self._context,), generator=generator).tolist()
        token = self._forward(self._ids(prompt), self._positions(0, self._context)).argmax().view(1, 1)
        positions = self._positions(self._context, 1)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            token.copy_(self._next(token, positions))
            positions += 1
            token.item()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _next_token(self, token: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._forward(token, positions).argmax().view(1, 1)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[V], of the last token."""
        out: Any = self._model(
            input_ids=ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = out.logits[0, -1]
        return logits

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self._device)

    def _positions(self, first: int, count: int) -> torch.Tensor:
        return torch.arange(first, first + count, device=self._device)[None]
