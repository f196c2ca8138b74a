"""gemma2-fast quantize: a checkpoint in bfloat16 or float32 → a quantised copy that loads without conversion."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from gemma2_fast import __version__
from gemma2_fast.cli.options import Subparsers, add_flags, add_hub_options, hub_arguments
from gemma2_fast.errors import RequestError
from gemma2_fast.weights.hub import resolve_model
from gemma2_fast.weights.load import load_checkpoint
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.quantize import QUANTIZATIONS, quantize_checkpoint


def add_parser(commands: Subparsers[Any]) -> None:
    parser = commands.add_parser(
        "quantize",
        help="write a quantised copy of a checkpoint",
        description="Write a quantised copy of a checkpoint of bfloat16, float16 or float32 safetensors into a "
        "directory that loads without conversion. Needs little memory, whatever the size of the model.",
    )
    parser.add_argument("source", metavar="SRC", help="hub id or local directory")
    parser.add_argument("destination", metavar="DST", type=Path, help="directory to write")
    parser.add_argument("--quantization", choices=sorted(QUANTIZATIONS, reverse=True), required=True)
    parser.add_argument("--overwrite", action="store_true", help="replace the model that DST holds")
    parser.add_argument("--num-threads", type=int, metavar="N", help="threads, this one included (default: all)")
    add_flags(parser)
    add_hub_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    num_threads = len(os.sched_getaffinity(0)) if args.num_threads is None else args.num_threads
    if num_threads < 1:
        raise RequestError(f"--num-threads must be a positive whole number, got {num_threads}")
    path = resolve_model(args.source, progress=not args.quiet, **hub_arguments(args))
    checkpoint = load_checkpoint(path)
    stored = ", ".join(checkpoint.matrix_formats)
    origin = Origin(args.quantization, f"{source_name(args.source, path)}, {stored}", __version__)
    quantize_checkpoint(
        checkpoint,
        args.destination,
        origin,
        overwrite=args.overwrite,
        num_threads=num_threads,
        progress=not args.quiet,
    )
    if not args.quiet:
        written = load_checkpoint(args.destination)
        print(
            f"{args.destination}: {args.quantization}, {written.num_weight_bytes / 1e9:.2f} GB, "
            f"{written.bits_per_weight:.2f} bits a weight; {args.source} has {checkpoint.num_weight_bytes / 1e9:.2f} GB"
        )


def source_name(source: str, path: Path) -> str:
    """The model's name for those who get the copy: no path of this machine; a hub id with its commit."""
    if path.parent.name == "snapshots":
        return f"{source}@{path.name[:12]}"
    return path.resolve().name
