"""gemma2-fast info: what a model is and what it would take here, before anything is allocated."""

from __future__ import annotations

import argparse
import json
from typing import Any

from gemma2_fast import Generator
from gemma2_fast.cli.options import Subparsers, add_common, add_model_options, model_arguments


def add_parser(commands: Subparsers[Any]) -> None:
    parser = commands.add_parser(
        "info",
        help="show a model's sizes, cache plan and kernels",
        description="Show a model's shape, sizes, cache plan, chosen kernels and assumed values. Allocates nothing.",
    )
    add_common(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--max-batch-size", type=int, metavar="N", default=argparse.SUPPRESS, help="requests at a time")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    batch = {"max_batch_size": args.max_batch_size} if hasattr(args, "max_batch_size") else {}
    description = Generator.describe(args.model, **batch, **model_arguments(args))
    if args.json:
        print(json.dumps(description.to_json(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(description.lines()))
