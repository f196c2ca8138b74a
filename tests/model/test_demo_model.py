"""The real Gemma 3 270M against figures that transformers computed from the same file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2_fast import Generator

pytestmark = pytest.mark.demo

EXPECTED = json.loads((Path(__file__).parents[1] / "data" / "gemma3_270m_expected.json").read_text())["cases"]
BACKENDS = ("cpu", "reference")


@pytest.fixture(scope="module", params=BACKENDS)
def gen(request: pytest.FixtureRequest) -> Iterator[Generator]:
    with Generator.from_pretrained(
        "gemma-3-270m", backend=request.param, activations="float32", max_seq_len=512, progress=False
    ) as generator:
        assert generator.backend == request.param
        yield generator


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: case["prompt"][:16])
def test_published_figures(gen: Generator, case: dict[str, Any]) -> None:
    assert gen.tokenizer.encode(case["prompt"]) == case["ids"]
    generation = gen.generate(case["prompt"], max_tokens=24, temperature=0)
    assert list(generation.token_ids) == case["greedy"]
    assert generation.text == case["text"]
    last = gen.logits(case["prompt"])[-1]
    best = np.argsort(-last)[:5]
    assert best.tolist() == [token for token, _ in case["top5"]]
    np.testing.assert_allclose(last[best], [logit for _, logit in case["top5"]], atol=2e-3)
    assert -gen.score(case["prompt"]).mean() == pytest.approx(case["mean_nll_nats"], abs=1e-3)


def test_backends_agree_past_the_window() -> None:
    """A prompt of 700 tokens crosses the window of 512 by more than a page."""
    ids = np.random.default_rng(3).integers(300, 200000, 700).tolist()
    last = {}
    for backend in BACKENDS:
        with Generator.from_pretrained(
            "gemma-3-270m", backend=backend, activations="float32", max_seq_len=1024, progress=False
        ) as gen:
            last[backend] = gen.generate(ids, max_tokens=1, logprobs=5).logprobs
    cpu, reference = last["cpu"][0], last["reference"][0]
    assert cpu.token_id == reference.token_id
    for (token, logprob), (other, other_logprob) in zip(cpu.top, reference.top, strict=True):
        assert token == other
        assert logprob == pytest.approx(other_logprob, abs=2e-3)


def test_streams_equal_the_whole_and_chat_uses_the_turn_format() -> None:
    with Generator.from_pretrained("gemma-3-270m", max_seq_len=512, progress=False) as gen:
        whole = gen.generate("Once upon a time", max_tokens=40)
        chunks = list(gen.stream("Once upon a time", max_tokens=40))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert chunks[-1].generation.token_ids == whole.token_ids
        assert [c.generation for c in chunks[:-1]] == [None] * (len(chunks) - 1)

        prompt = [{"role": "user", "content": "Hello!"}]
        turn = [2, 105, 2364, 107, 9259, 236888, 106, 107, 105, 4368, 107]
        assert gen.chat(prompt, max_tokens=8).token_ids == gen.generate(turn, max_tokens=8).token_ids


def test_a_stop_string_ends_its_request_while_others_run() -> None:
    with Generator.from_pretrained("gemma-3-270m", max_seq_len=512, progress=False) as gen:
        prompts = ["Once upon a time", "The capital of France is"]
        before = gen.stats()["num_decode_tokens"]
        long, short = gen.generate(prompts, max_tokens=80, stop=[" France"], temperature=0, ignore_eos=True)
        assert short.text == " the capital of the country of"
        assert (short.finish_reason, len(short.token_ids)) == ("stop", 7)
        assert " France" not in long.text
        assert gen.stats()["num_decode_tokens"] - before < len(long.token_ids) + 40


@pytest.mark.parametrize(("activations", "field"), [("float32", "VmHWM"), ("int8", "VmRSS")])
def test_memory_stays_near_the_file(activations: str, field: str) -> None:
    """253 MB of weights, from the map or in strips of this process's own, and everything else in less than 200.

    While strips are made the file is in memory as well; afterwards its pages are given back.
    """
    script = (
        "import gemma2_fast\n"
        f"gen = gemma2_fast.Generator.from_pretrained('gemma-3-270m', activations='{activations}', progress=False)\n"
        "gen.generate('The capital of France is', max_tokens=24)\n"
        "status = open('/proc/self/status').read()\n"
        f"print(next(line.split()[1] for line in status.splitlines() if line.startswith('{field}')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)
    assert int(done.stdout) * 1024 < 450e6
