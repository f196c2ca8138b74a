"""The public face on a small model: batches, streams, threads, cancellation, scores, and what it refuses."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2_fast import Generator, SamplingParams
from gemma2_fast.errors import (
    BackendError,
    CapacityError,
    ConfigError,
    Gemma2FastError,
    GenerationError,
    RequestError,
    TokenizerError,
)
from gemma2_fast.weights.tensor import Tensor
from tests.support.checkpoints import generator, quantisable_spec, random_weights
from tests.support.tiny_models import tiny_model

SPEC = quantisable_spec("gemma2")
WEIGHTS = random_weights(SPEC, "F32")
PROMPT = [2, 100, 200, 300]
TOKENIZER = Path(__file__).parents[1] / "data" / "gemma_1_2_tokenizer.model"


@pytest.fixture(scope="module")
def gen() -> Iterator[Generator]:
    with generator(SPEC, WEIGHTS) as made:
        yield made


def idle(gen: Generator) -> bool:
    """Whether nothing runs and every block is back in its pool, within a second."""
    for _ in range(100):
        stats = gen.stats()
        free = all(group["num_free"] == group["num_blocks"] for group in stats["groups"])
        if stats["num_running"] == stats["num_waiting"] == 0 and free:
            return True
        time.sleep(0.01)
    return False


def test_a_batch_is_its_singles(gen: Generator) -> None:
    prompts = [[2, n, n + 1] for n in range(10)]
    together = gen.generate(prompts, max_tokens=20)
    assert [g.token_ids for g in together] == [gen.generate(p, max_tokens=20).token_ids for p in prompts]
    assert all(len(g.token_ids) == 20 and g.finish_reason == "length" for g in together)
    assert together[0].usage.prompt_tokens == 3
    assert together[0].text is None


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(gen: Generator) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=30)
    alone = gen.generate(PROMPT, params)
    batch = gen.generate([[5, 6], PROMPT, [7]], params)
    assert batch[1].token_ids == alone.token_ids
    assert gen.generate(PROMPT, params, seed=8).token_ids != alone.token_ids


def test_several_samples(gen: Generator) -> None:
    samples = gen.generate(PROMPT, temperature=1.0, seed=1, n=3, max_tokens=10)
    assert len({s.token_ids for s in samples}) == 3
    assert samples[0].token_ids == gen.generate(PROMPT, temperature=1.0, seed=1, max_tokens=10).token_ids
    with pytest.raises(RequestError, match="n=3"):
        gen.stream(PROMPT, n=3)


def test_scores_are_those_of_the_logits(gen: Generator) -> None:
    ids = np.random.default_rng(0).integers(0, 512, 90).tolist()
    logits = gen.logits(ids).astype(np.float64)
    assert logits.shape == (90, 512)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(gen.score(ids), expected[np.arange(89), ids[1:]], atol=1e-5)
    generation = gen.generate(ids, max_tokens=1, logprobs=2, prompt_logprobs=1)
    assert [row.token_id for row in generation.prompt_logprobs] == ids[1:]
    best = int(logits[-1].argmax())
    assert generation.token_ids == (best,)
    assert generation.logprobs[0].top[0] == (best, generation.logprobs[0].logprob)
    assert generation.logprobs[0].logprob == pytest.approx(expected[-1, best], abs=1e-5)
    assert gen.score([5]).shape == (0,)


def test_stop_ids_end_the_tokens(gen: Generator) -> None:
    free = gen.generate(PROMPT, max_tokens=30)
    stop = free.token_ids[10]
    first = free.token_ids.index(stop)
    stopped = gen.generate(PROMPT, max_tokens=30, stop_token_ids=[stop])
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    later = gen.generate(PROMPT, max_tokens=30, stop_token_ids=[stop], min_tokens=first + 3)
    assert len(later.token_ids) >= first + 3


def test_streams_from_eight_threads(gen: Generator) -> None:
    prompts = [[n, 3 * n, 7] for n in range(8)]
    expected = [gen.generate(p, max_tokens=40).token_ids for p in prompts]

    def read(prompt: list[int]) -> tuple[int, ...]:
        return tuple(t for chunk in gen.stream(prompt, max_tokens=40) for t in chunk.token_ids)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, prompts)) == expected
    assert idle(gen)


def test_closing_or_dropping_a_stream_frees_its_blocks(gen: Generator) -> None:
    stream = gen.stream(PROMPT, max_tokens=400)
    next(stream)
    stream.close()
    assert idle(gen)
    assert list(stream) == []
    with gen.stream(PROMPT, max_tokens=400) as stream:
        next(stream)
    assert idle(gen)
    stream = gen.stream(PROMPT, max_tokens=400)
    del stream
    gc.collect()
    assert idle(gen)


def test_a_pool_for_two_serves_eight() -> None:
    prompts = [[n] * (20 + 9 * n) for n in range(1, 9)]
    with generator(SPEC, WEIGHTS, max_seq_len=256) as roomy:
        expected = [g.token_ids for g in roomy.generate(prompts, max_tokens=60)]
        one = roomy.plan.cache.num_bytes / roomy.plan.cache.max_sequences
    with generator(SPEC, WEIGHTS, max_seq_len=256, kv_cache_gib=2 * one / 2**30, max_step_tokens=64) as tight:
        assert [g.token_ids for g in tight.generate(prompts, max_tokens=60)] == expected
        assert idle(tight)
        windowed, whole = tight.plan.cache.paged
        for group, stats in zip((windowed, whole), tight.stats()["groups"], strict=True):
            assert stats["peak_held"] <= group.table_width
        assert windowed.table_width < whole.table_width


def test_a_request_that_can_never_fit_is_refused(gen: Generator) -> None:
    with pytest.raises(RequestError, match="512"):
        gen.generate([5] * 513)
    with pytest.raises(RequestError, match="512"):
        gen.logits([5] * 513)
    with pytest.raises(CapacityError, match="max_seq_len"):
        generator(SPEC, WEIGHTS, kv_cache_gib=1e-5)
    full = gen.generate([5] * 512, max_tokens=5)
    assert (full.finish_reason, len(full.token_ids)) == ("length", 0)


BAD_REQUESTS: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "empty|no tokens"),
    ([512], {}, "512"),
    ([-1], {}, "-1"),
    ([1.5], {}, "whole numbers"),
    ([True], {}, "whole numbers"),
    ([[1, 2], []], {}, "empty|no tokens"),
    (PROMPT, {"temperature": float("nan")}, "temperature"),
    (PROMPT, {"temperature": -1}, "temperature"),
    (PROMPT, {"top_p": 0}, "top_p"),
    (PROMPT, {"top_p": 1.5}, "top_p"),
    (PROMPT, {"top_k": -1}, "top_k"),
    (PROMPT, {"temperature": 10**400}, "temperature"),
    (PROMPT, {"stop": None}, "stop"),
    (PROMPT, {"params": {"temperature": 0}}, "SamplingParams"),
    (5, {}, "token ids"),
    (None, {}, "token ids"),
    (b"hi", {}, "token ids"),
    ("", {}, "empty"),
    (PROMPT, {"top_k": 1.5}, "top_k"),
    (PROMPT, {"min_p": -0.1}, "min_p"),
    (PROMPT, {"repetition_penalty": 0}, "repetition_penalty"),
    (PROMPT, {"presence_penalty": float("inf")}, "presence_penalty"),
    (PROMPT, {"max_tokens": -1}, "max_tokens"),
    (PROMPT, {"max_tokens": 2, "max_new_tokens": 3}, "max_new_tokens|max_tokens"),
    (PROMPT, {"seed": -1}, "seed"),
    (PROMPT, {"n": 0}, "n must"),
    (PROMPT, {"n": 10**9}, "n must"),
    (PROMPT, {"logprobs": 10**6}, "logprobs"),
    (PROMPT, {"stop": [""]}, "stop"),
    (PROMPT, {"stop": ["x"]}, "tokenizer"),
    (PROMPT, {"stop_token_ids": [-5]}, "stop_token_ids"),
    (PROMPT, {"logit_bias": {9999: 1.0}}, "9999"),
    (PROMPT, {"logit_bias": [1]}, "logit_bias"),
    (PROMPT, {"temprature": 1.0}, "temprature.*known.*temperature"),
    ("text", {}, "tokenizer"),
]


@pytest.mark.parametrize(("prompt", "changes", "named"), BAD_REQUESTS)
def test_bad_requests_are_refused_and_the_engine_lives(
    gen: Generator, prompt: Any, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises((RequestError, TokenizerError), match=named):
        gen.generate(prompt, **changes)
    assert idle(gen)
    assert len(gen.generate(PROMPT, max_tokens=2).token_ids) == 2


BAD_OPTIONS: list[tuple[dict[str, Any], type[Gemma2FastError], str]] = [
    ({"backend": "tpu"}, RequestError, "'cpu'"),
    ({"dtype": "float16"}, BackendError, "overflow"),
    ({"quantization": "int3"}, RequestError, "None, 'int8', 'int4'"),
    ({"activations": "int8"}, RequestError, "needs quantised weights"),
    ({"activations": "int4"}, RequestError, "'auto', 'float32', 'int8'"),
    ({"kv_dtype": "int4"}, RequestError, "'int8'"),
    ({"max_seq_len": 0}, RequestError, "max_seq_len"),
    ({"max_seq_len": 10**6}, RequestError, "512 positions"),
    ({"num_threads": 10**6}, Gemma2FastError, "threads"),
    ({"max_batch_size": "8"}, RequestError, "max_batch_size"),
    ({"kv_cache_gib": -1}, RequestError, "kv_cache_gib"),
    ({"kv_cache_gib": 10**5}, CapacityError, "free memory"),
    ({"sliding_window": 0}, RequestError, "sliding_window"),
    ({"instruction_set": "neon"}, BackendError, "neon"),
]


@pytest.mark.parametrize(("options", "kind", "named"), BAD_OPTIONS)
def test_bad_options_are_refused(options: dict[str, Any], kind: type[Gemma2FastError], named: str) -> None:
    with pytest.raises(kind, match=named):
        generator(SPEC, WEIGHTS, **options)


def test_a_window_on_a_model_without_one_is_refused() -> None:
    spec = quantisable_spec("gemma")
    with pytest.raises(ConfigError, match="no layer"):
        generator(spec, random_weights(spec, "F32"), sliding_window=100)


def test_nan_weights_end_every_request_with_an_error_and_nothing_else() -> None:
    rows = WEIGHTS["embedding"].to_float32().copy()
    rows[77] = np.nan
    # The head reads the same rows, so no request can go on; tests/runtime has one whose neighbours do.
    with generator(SPEC, {**WEIGHTS, "embedding": Tensor.from_float32(rows)}) as gen:
        with pytest.raises(GenerationError, match="finite|NaN"):
            gen.generate(PROMPT, max_tokens=3)
        assert idle(gen)
        with pytest.raises(GenerationError, match="finite|NaN"):
            gen.generate(PROMPT, max_tokens=3)


def test_a_stream_keeps_its_generator_alive() -> None:
    stream = generator(SPEC, WEIGHTS).stream(PROMPT, max_tokens=50)
    gc.collect()
    assert len([t for chunk in stream for t in chunk.token_ids]) == 50


def test_a_closed_generator_says_so() -> None:
    gen = generator(SPEC, WEIGHTS)
    stream = gen.stream(PROMPT, max_tokens=400)
    gen.close()
    gen.close()
    with pytest.raises(GenerationError, match="cancelled"):
        list(stream)
    with pytest.raises(BackendError, match="closed"):
        gen.generate(PROMPT)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    """It has 256,000 pieces, the model 512 rows; a text of its first pieces alone would pass unseen."""
    directory = tiny_model("recurrent_gemma", tmp_path).directory
    shutil.copy(TOKENIZER, directory / "tokenizer.model")
    with (
        Generator.from_pretrained(directory) as gen,
        pytest.raises(TokenizerError, match=r"id \d+, but the model has 512 rows: they are of different models"),
    ):
        gen.generate("Water boils at", max_tokens=3)


def test_missing_paths_and_files(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        Generator.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"config\.json"):
        Generator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Gemma2FastError, match="JSON"):
        Generator.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
