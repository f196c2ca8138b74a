"""The same sequence gives the same bits, whatever shares its batch, its chunk, its threads or its cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from gemma2_fast import Generator, _core
from gemma2_fast.quant import FORMATS
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.tensor import Tensor
from tests.support.checkpoints import WINDOW_KEYS, generator, quantisable_spec, random_weights

LENGTHS = [1, WINDOW_KEYS - 1, WINDOW_KEYS + 1, 32, 33, 97, 2 * WINDOW_KEYS + 3, 150]
FAMILIES = ["gemma", "gemma2", "gemma3_text", "recurrent_gemma"]
SETS = _core.instruction_sets()
CASES = [("gemma2", f, s) for f in FORMATS for s in SETS]
CASES += [("recurrent_gemma", f, s) for f in ("F32", "BF16", "INT8_G128", "INT4_G32") for s in SETS]


@cache
def model(family: str, format_name: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    spec = quantisable_spec(family)
    return spec, random_weights(spec, format_name)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, 512, length).tolist() for length in LENGTHS]


def start(family: str, format_name: str, **options: object) -> Generator:
    return generator(*model(family, format_name), max_logits_rows=256, **options)


def bits(gen: Generator, ids: list[int]) -> bytes:
    logits = gen.logits(ids)
    assert np.isfinite(logits).all()
    return logits.tobytes()


@pytest.mark.parametrize(("family", "format_name", "instruction_set"), CASES)
def test_chunks_threads_and_batches(family: str, format_name: str, instruction_set: str) -> None:
    ids = prompts()[-1]
    with start(family, format_name, instruction_set=instruction_set, num_threads=1, max_step_tokens=256) as whole:
        alone = {len(p): bits(whole, p) for p in prompts()}
    for chunk, threads in [(1, 1), (5, 2), (64, 2)]:
        with start(
            family,
            format_name,
            instruction_set=instruction_set,
            num_threads=threads,
            max_step_tokens=chunk,
            max_batch_size=1,
        ) as gen:
            assert bits(gen, ids) == alone[len(ids)], f"chunks of {chunk}, {threads} threads"
    with (
        start(family, format_name, instruction_set=instruction_set, num_threads=2, max_step_tokens=80) as gen,
        ThreadPoolExecutor(8) as pool,
    ):
        for prompt, got in zip(prompts(), pool.map(lambda p: bits(gen, p), prompts()), strict=True):
            assert got == alone[len(prompt)], f"{len(prompt)} tokens in a batch of 8"


@pytest.mark.parametrize("format_name", ["BF16", "INT8_G128", "INT4_G32", "Q4_K"])
def test_strips_at_once(format_name: str) -> None:
    """A head of 25 strips is claimed by four with one thread, by two with two, one by one with five."""
    spec = replace(quantisable_spec("gemma2"), vocab_size=1600)
    weights = random_weights(spec, format_name)
    ids = prompts()[-1]
    results = []
    for threads in (1, 2, 5):
        with generator(spec, weights, max_logits_rows=256, num_threads=threads) as gen:
            results.append((bits(gen, ids), bits(gen, ids[:1])))
    assert results[1:] == results[:1] * 2


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_and_cache_types(family: str, kv_dtype: str) -> None:
    ids = np.random.default_rng(11).integers(0, 512, 300).tolist()  # past a block of 256 keys
    with start(family, "BF16", kv_dtype=kv_dtype, num_threads=1, max_step_tokens=256) as gen:
        whole = bits(gen, ids)
    with start(family, "BF16", kv_dtype=kv_dtype, num_threads=2, max_step_tokens=7, max_batch_size=1) as gen:
        assert bits(gen, ids) == whole


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize(
    ("family", "format_name"), [("gemma2", "F32"), ("gemma2", "BF16"), ("gemma2", "Q4_K"), ("recurrent_gemma", "BF16")]
)
def test_preempted_and_resumed(family: str, format_name: str, instruction_set: str) -> None:
    """Eight requests over room for two: ids and log-probabilities equal those of each request alone."""
    with start(family, format_name, instruction_set=instruction_set) as gen:
        roomy = [gen.generate(p, max_tokens=40, logprobs=3, temperature=1.0, seed=5) for p in prompts()]
        one_sequence = gen.plan.cache.num_bytes / gen.plan.cache.max_sequences
    with start(
        family,
        format_name,
        max_step_tokens=48,
        kv_cache_gib=0.8 * one_sequence / 2**30,
        max_seq_len=200,
        instruction_set=instruction_set,
    ) as gen:
        crowded = gen.generate(prompts(), max_tokens=40, logprobs=3, temperature=1.0, seed=5)
        assert gen.stats()["num_preemptions"] > 0
    assert [g.token_ids for g in crowded] == [g.token_ids for g in roomy]
    assert [g.logprobs for g in crowded] == [g.logprobs for g in roomy]


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [("gemma2", "float32"), ("gemma2", "bfloat16"), ("gemma2", "int8"), ("recurrent_gemma", "float32")],
)
def test_unwritten_cache_slots_are_never_read(family: str, kv_dtype: str) -> None:
    """Every page and state starts as NaN; a read of a slot that no token was written to would spread it."""
    from gemma2_fast.engine.engine import core_cache_plan, cpu_step

    spec, weights = model(family, "F32")
    with start(family, "F32", kv_dtype=kv_dtype, max_step_tokens=33) as gen:
        plan, clean = gen.plan, gen.logits(prompts()[-1])
    cache = core_cache_plan(plan.cache)
    step = cpu_step(plan, weights, cache)
    step.poison_cache()
    limits = _core.Limits(
        max_running_sequences=8,
        max_step_tokens=33,
        max_seq_len=512,
        max_logits_rows=33,
        vocab_size=spec.vocab_size,
        final_softcap=spec.final_softcap,
    )
    loop = _core.DecodeLoop(step, cache, limits)
    out = np.empty_like(clean)
    request = _core.Request(token_ids=prompts()[-1], sampling=_core.SamplingParams(max_tokens=0), logits_out=out)
    sequence = loop.submit(request)
    events = loop.wait(sequence, 60.0)
    while events[-1].finish_reason is None:
        events = loop.wait(sequence, 60.0)
    loop.close()
    assert events[-1].finish_reason == "length"
    assert np.array_equal(out, clean)
