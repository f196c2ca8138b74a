"""The same work by this package and by its peers, in turn, each in a process of its own.

    python -m gemma2_fast.bench.peers gemma-3-270m --peer llama_cpp
    python -m gemma2_fast.bench.peers DIRECTORY --peer transformers

Prints the medians over the rounds and their ratios. Peers are not installed with the package: the [bench] extra names
llama-cpp-python, the [test] extra transformers.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.weights.demo import DEMO_MODEL, demo_model_path

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Work:
    """Evaluate a prompt of random ids, then decode one sequence greedily."""

    model: str
    prompt_tokens: int
    decode_tokens: int
    num_threads: int

    def prompt(self) -> Ids:
        return np.random.default_rng(0).integers(300, 200_000, self.prompt_tokens)


@dataclass(frozen=True)
class Result:
    """load_s: until the first prompt can be submitted; peak_bytes: resident memory of the process at its highest."""

    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    peak_bytes: int


def run_gemma2_fast(work: Work) -> Result:
    from gemma2_fast import Generator

    start = time.perf_counter()
    max_seq_len = work.prompt_tokens + work.decode_tokens + 1
    with Generator.from_pretrained(
        work.model, num_threads=work.num_threads, max_seq_len=max_seq_len, max_batch_size=1, progress=False
    ) as gen:
        load_s = time.perf_counter() - start
        ids = work.prompt().tolist()
        gen.generate(ids[:16], max_tokens=2, ignore_eos=True)
        timings = gen.generate(ids, max_tokens=work.decode_tokens + 1, temperature=0, ignore_eos=True).timings
    return Result(load_s, timings.prefill_tokens_per_second, timings.decode_tokens_per_second, peak_bytes())


def run_llama_cpp(work: Work) -> Result:
    import llama_cpp

    start = time.perf_counter()
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(None))
    model = llama_cpp.llama_model_load_from_file(
        str(model_file(work.model)).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = work.prompt_tokens + work.decode_tokens + 64
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = work.num_threads
    context = llama_cpp.llama_init_from_model(model, params)
    load_s = time.perf_counter() - start

    def evaluate(ids: Ids) -> int:
        for first in range(0, len(ids), 512):
            tokens = np.ascontiguousarray(ids[first : first + 512], dtype=np.int32)  # the batch only points at them
            pointer = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
            if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(pointer, len(tokens))):
                raise RuntimeError("llama_decode failed")
        vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(vocab_size,))
        return int(logits.argmax())

    memory = llama_cpp.llama_get_memory(context)
    return _timed(work, load_s, evaluate, lambda: llama_cpp.llama_memory_clear(memory, True))


def run_transformers(work: Work) -> Result:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    start = time.perf_counter()
    torch.set_num_threads(work.num_threads)
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype="auto")
    model.train(False)
    load_s = time.perf_counter() - start
    cache = [DynamicCache(config=model.config)]

    def evaluate(ids: Ids) -> int:
        with torch.no_grad():
            out = model(torch.from_numpy(ids)[None], past_key_values=cache[0], use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def clear() -> None:
        cache[0] = DynamicCache(config=model.config)

    return _timed(work, load_s, evaluate, clear)


def _timed(work: Work, load_s: float, evaluate: Callable[[Ids], int], clear: Callable[[], None]) -> Result:
    """Warm up, then time the prompt and the decoding of an engine that `evaluate` appends to."""
    ids = work.prompt()
    evaluate(ids[:16])
    clear()
    start = time.perf_counter()
    token = evaluate(ids)
    prefill_s = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(work.decode_tokens):
        token = evaluate(np.array([token]))
    decode_s = time.perf_counter() - start
    return Result(load_s, work.prompt_tokens / prefill_s, work.decode_tokens / decode_s, peak_bytes())


def model_file(model: str) -> Path:
    return demo_model_path(progress=False) if model == DEMO_MODEL else Path(model)


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


ENGINES = {"gemma2_fast": run_gemma2_fast, "llama_cpp": run_llama_cpp, "transformers": run_transformers}


def run_apart(engine: str, work: Work) -> Result:
    """Run one engine in a fresh process."""
    command = [sys.executable, "-m", __spec__.name, "--worker", engine, json.dumps(asdict(work))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{engine} failed:\n{done.stderr[-2000:]}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def compare(work: Work, peer: str, rounds: int) -> dict[str, Any]:
    """Alternate the engines and reduce each figure to its median over the rounds."""
    results: dict[str, list[Result]] = {"gemma2_fast": [], peer: []}
    for _ in range(rounds):
        for engine, found in results.items():
            found.append(run_apart(engine, work))
    medians = {
        engine: {name: statistics.median(getattr(r, name) for r in found) for name in Result.__annotations__}
        for engine, found in results.items()
    }
    ratios = {
        name: statistics.median(getattr(a, name) / getattr(b, name) for a, b in zip(*results.values(), strict=True))
        for name in Result.__annotations__
    }
    return {"work": asdict(work), "rounds": rounds, "medians": medians, "ratios": ratios}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(asdict(ENGINES[sys.argv[2]](Work(**json.loads(sys.argv[3]))))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='a GGUF file, a checkpoint directory or "gemma-3-270m"')
    parser.add_argument("--peer", choices=[name for name in ENGINES if name != "gemma2_fast"], required=True)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens (default: 512)")
    parser.add_argument("--decode", type=int, default=32, help="decoded tokens (default: 32)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = compare(Work(args.model, args.prompt, args.decode, args.threads), args.peer, args.rounds)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{'median of ' + str(args.rounds):28}{'gemma2_fast':>14}{args.peer:>14}{'ratio':>8}")
    for name, label, scale in (
        ("load_s", "load, s", 1),
        ("prefill_tokens_per_s", f"prefill {args.prompt}, tokens/s", 1),
        ("decode_tokens_per_s", "decode, tokens/s", 1),
        ("peak_bytes", "peak memory, MB", 1e-6),
    ):
        ours, theirs = (found["medians"][engine][name] * scale for engine in ("gemma2_fast", args.peer))
        print(f"{label:28}{ours:14.2f}{theirs:14.2f}{found['ratios'][name]:8.2f}")


if __name__ == "__main__":
    main()
