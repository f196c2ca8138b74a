"""The options of our own engine in a measurement, and the engine they start."""

from __future__ import annotations

import argparse
from typing import Any

from gemma2_fast import Generator
from gemma2_fast.bench.command import add_threads
from gemma2_fast.bench.engines import OURS, EngineSpec
from gemma2_fast.description import Description
from gemma2_fast.weights.demo import DEMO_MODEL, demo_model_path
from gemma2_fast.weights.quantize import QUANTIZATIONS

NAMES = ("dtype", "quantization", "activations", "kv_dtype", "instruction_set")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="a checkpoint's directory, a .gguf file, a hub id, or gemma-3-270m")
    add("--dtype", help="as for gemma2-fast generate, and so the following")
    add("--quantization", choices=sorted(QUANTIZATIONS))
    add("--activations")
    add("--kv-dtype")
    add("--instruction-set")
    add_threads(parser)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of from_pretrained; what was not given keeps its default."""
    return {name: getattr(args, name) for name in NAMES if getattr(args, name) is not None}


def describe(args: argparse.Namespace) -> Description:
    return Generator.describe(args.model, num_threads=args.threads, **options_of(args))


def our_engine(args: argparse.Namespace, max_batch: int, max_context: int) -> EngineSpec:
    settings = {
        "model": str(args.model),
        "threads": args.threads,
        "max_batch": max_batch,
        "max_context": max_context,
        "options": options_of(args),
    }
    return EngineSpec(OURS, OURS, settings)


def model_path(model: str) -> str:
    """Where the model lies, for engines that know no demo model."""
    return str(demo_model_path(progress=False)) if model == DEMO_MODEL else model
