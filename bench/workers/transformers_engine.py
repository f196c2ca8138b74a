"""transformers with PyTorch on the checkpoint as it is stored."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers


class Transformers:
    """A checkpoint's directory. settings: model, threads, options (dtype, as stored by default)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        torch.set_num_threads(settings["threads"])
        dtype = settings["options"].get("dtype", "auto")
        self._model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype)
        self._model.train(False)
        self._random = torch.Generator().manual_seed(0)

    def prefill(self, tokens: int) -> float:
        return self._step(self._ids(1, tokens), self._empty_cache())

    def decode(self, batch: int, context: int, steps: int) -> float:
        cache = self._empty_cache()
        self._step(self._ids(batch, context), cache)
        return sum(self._step(self._ids(batch, 1), cache) for _ in range(steps))

    def likeliest(self, ids: list[int]) -> list[tuple[int, float]]:
        with torch.no_grad():
            logits = self._model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()
        top = logits.topk(5)
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        most = min(200_000, self._model.config.vocab_size)
        return torch.randint(min(300, most // 2), most, (batch, tokens), generator=self._random)

    def _empty_cache(self) -> Any:
        return transformers.DynamicCache(config=self._model.config)

    def _step(self, ids: torch.Tensor, cache: Any) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


def load(settings: dict[str, Any]) -> Transformers:
    return Transformers(settings)
