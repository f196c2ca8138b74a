"""Small results of every kind, as the measurements write them."""

from __future__ import annotations

from typing import Any

from gemma2_fast.bench.record import record

LIMITS = {"read_bytes": 20.0, "float32_operations": 300.0, "int8_operations": 1200.0}


def machine() -> dict[str, Any]:
    rows = [{"instruction_set": "avx2", "threads": threads, **LIMITS} for threads in (1, 2)]
    return record("machine", {"threads": [1, 2], "seconds": 1.0}, rows)


def ops() -> dict[str, Any]:
    def row(op: str, num_bytes: float, operations: float, limit: str, unit: str) -> dict[str, Any]:
        work = num_bytes if limit == "read_bytes" else operations
        return {
            "instruction_set": "avx2",
            "threads": 2,
            "op": op,
            "shape": "2b gate [9216, 2304] x 1",
            "num_bytes": num_bytes,
            "operations": operations,
            "microseconds": 1000.0,
            "limit": limit,
            "rate": work / 1e6,
            "unit": unit,
            "ceiling": LIMITS[limit],
            "percent": 100 * work / 1e6 / LIMITS[limit],
            "error": 1e-6,
            "cached": False,
        }

    rows = [
        row("matmul BF16", 16e6, 16e6, "read_bytes", "GB/s"),
        row("attention float32", 1e6, 150e6, "float32_operations", "GFLOP/s"),
    ]
    return record("ops", {"model": "2b", "threads": 2, "seconds": 1.0}, rows)


def generate() -> dict[str, Any]:
    def decode(context: int, batch: int) -> dict[str, Any]:
        return {
            "work": "decode",
            "context": context,
            "batch": batch,
            "steps": 4,
            "seconds": [0.4, 0.5, 0.6],
            "tokens_per_s": 8.0 * batch,
            "peak_bytes": 3 << 30,
            "limits": LIMITS,
            "step_s": 0.125,
            "bytes_per_step": 2e9,
            "gb_per_s": 16.0,
            "percent": {"read_bytes": 80.0},
        }

    prefill = {
        "work": "prefill",
        "context": 512,
        "batch": 1,
        "steps": 1,
        "seconds": [2.0],
        "tokens_per_s": 256.0,
        "peak_bytes": 3 << 30,
        "limits": LIMITS,
        "first_token_s": 2.0,
        "operations_per_token": 3e9,
        "gop_per_s": 768.0,
        "percent": {"int8_operations": 64.0, "float32_operations": 256.0},
    }
    settings = {"model": "models/2b-hf", "threads": 2, "rounds": 3, "options": {"quantization": "int8"}}
    rows = [prefill, decode(1, 1), decode(8159, 1), decode(16, 1), decode(16, 8)]
    return record("generate", settings, rows, {"gemma2_fast": "0.1.0"})


def flat() -> dict[str, Any]:
    def decode(part: str, model: str, context: int, speed: float, **more: Any) -> dict[str, Any]:
        return {
            "part": part,
            "model": model,
            "work": "decode",
            "context": context,
            "batch": 1,
            "steps": 4,
            "seconds": [4 / speed] * 3,
            "tokens_per_s": speed,
            "peak_bytes": 3 << 30,
            "limits": LIMITS,
            "percent": {"read_bytes": 80.0},
            **more,
        }

    def sample(tokens: int) -> dict[str, Any]:
        figures = {"tokens": tokens, "seconds": 0.5, "tokens_per_s": 1000.0, "anonymous_bytes": (20 << 20) + tokens}
        return {"part": "series", "model": "small", **figures}

    rows = [
        decode("prompt", "rg", 2100, 7.0, speed_ratio=1.0, cache_bytes=3 << 20, anonymous_bytes=40 << 20),
        decode("prompt", "rg", 30000, 6.9, speed_ratio=0.985, cache_bytes=3 << 20, anonymous_bytes=41 << 20),
        decode("context", "rg", 64, 7.1),
        decode("context", "g", 64, 7.5),
        decode("context", "g", 8000, 6.5),
        *map(sample, range(500, 5001, 500)),
        {"part": "slope", "model": "small", "first_token": 500, "speed_percent": 0.0, "bytes_per_token": 1.0},
    ]
    settings = {"model": "rg", "beside": ["g"], "threads": 2, "rounds": 3, "options": {"kv_dtype": "float32"}}
    return record("flat", settings, rows)


def peers() -> dict[str, Any]:
    def row(engine: str, batch: int, speed: float) -> dict[str, Any]:
        return {
            "work": "decode",
            "context": 64,
            "batch": batch,
            "steps": 4,
            "engine": engine,
            "seconds": [0.5] * 5,
            "tokens_per_s": speed,
            "ratio": 1.0 if engine == "gemma2_fast" else 1.5,
            "percent": {"read_bytes": 70.0},
            "limits": LIMITS,
        }

    def engine(kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "model": "2b.gguf",
            "options": {},
            "environment": {},
            "load_s": 1.0,
            "peak_bytes": 3 << 30,
            "bytes_per_step": 2.6e9,
            "check": None if kind == "gemma2_fast" else "not compared: other weights",
        }

    names = ("gemma2_fast", "llama_cpp")
    settings = {
        "model": "models/2b-hf",
        "threads": 2,
        "rounds": 5,
        "options": {"quantization": "int8"},
        "engines": {name: engine(name) for name in names},
    }
    rows = [row(name, batch, batch * speed) for batch in (1, 8) for name, speed in zip(names, (7.5, 5.0), strict=True)]
    return record("peers", settings, rows, {"llama-cpp-python": "0.3.36"})
