"""llama.cpp through the C interface that llama-cpp-python wraps: no Python between two tokens but the call itself."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

MOST_TOKENS_A_CALL = 512


class LlamaCpp:
    """A GGUF file. settings: model, threads, max_batch, max_context."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(None))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(settings["model"].encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise ValueError(f"llama.cpp cannot load {settings['model']}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = settings["max_context"] * settings["max_batch"]
        params.n_seq_max = settings["max_batch"]
        params.n_batch = params.n_ubatch = MOST_TOKENS_A_CALL
        params.n_threads = params.n_threads_batch = settings["threads"]
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._rng = np.random.default_rng(0)

    def prefill(self, tokens: int) -> float:
        ids = self._random(tokens)
        self._clear()
        start = time.perf_counter()
        self._append([ids], 0)
        return time.perf_counter() - start

    def decode(self, batch: int, context: int, steps: int) -> float:
        self._clear()
        for sequence in range(batch):
            self._append([self._random(context)], 0, first_sequence=sequence)
        start = time.perf_counter()
        for step in range(steps):
            self._append([self._random(1) for _ in range(batch)], context + step)
        return time.perf_counter() - start

    def likeliest(self, ids: list[int]) -> list[tuple[int, float]]:
        self._clear()
        self._append([np.array(ids)], 0)
        pointer = llama_cpp.llama_get_logits_ith(self._context, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(self._vocab_size,))
        return [(int(token_id), float(logits[token_id])) for token_id in np.argsort(-logits)[:5]]

    def _random(self, tokens: int) -> NDArray[np.int64]:
        return self._rng.integers(300, min(200_000, self._vocab_size), tokens)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _append(self, sequences: list[NDArray[np.int64]], position: int, first_sequence: int = 0) -> None:
        """Evaluates the sequences' next tokens; one sequence may be longer than a call takes."""
        length = len(sequences[0])
        for begin in range(0, length, MOST_TOKENS_A_CALL):
            self._call([ids[begin : begin + MOST_TOKENS_A_CALL] for ids in sequences], position + begin, first_sequence)
        llama_cpp.llama_synchronize(self._context)

    def _call(self, sequences: list[NDArray[np.int64]], position: int, first_sequence: int) -> None:
        batch = llama_cpp.llama_batch_init(sum(map(len, sequences)), 0, 1)
        row = 0
        for sequence, ids in enumerate(sequences, first_sequence):
            for offset, token_id in enumerate(ids):
                batch.token[row] = int(token_id)
                batch.pos[row] = position + offset
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = sequence
                batch.logits[row] = offset == len(ids) - 1
                row += 1
        batch.n_tokens = row
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


def load(settings: dict[str, Any]) -> LlamaCpp:
    return LlamaCpp(settings)
