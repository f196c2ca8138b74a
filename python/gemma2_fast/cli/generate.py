"""gemma2-fast generate: one prompt in, text out as it comes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from time import perf_counter
from typing import Any

from gemma2_fast import Generation, Generator, SamplingParams
from gemma2_fast.cli.options import (
    Subparsers,
    add_common,
    add_model_options,
    add_sampling_options,
    add_text,
    model_arguments,
    read_text,
    sampling_arguments,
)
from gemma2_fast.cli.report import print_timings
from gemma2_fast.errors import GenerationError


def add_parser(commands: Subparsers[Any]) -> None:
    parser = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    add_common(parser)
    add_text(parser, "PROMPT")
    parser.add_argument("--json", action="store_true", help="print one JSON object when all is done")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="continuations, each sampled on its own")
    parser.add_argument("--logprobs", type=int, metavar="K", help="with --json: the K likeliest tokens at every place")
    parser.add_argument("--prompt-logprobs", type=int, metavar="K", help="with --json: the same for the prompt")
    add_sampling_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    wants_logprobs = args.logprobs is not None or args.prompt_logprobs is not None
    if wants_logprobs and not args.json:
        args.usage_error("--logprobs and --prompt-logprobs need --json")
    prompt = read_text(args)

    params = SamplingParams(
        n=args.n, logprobs=args.logprobs, prompt_logprobs=args.prompt_logprobs, **sampling_arguments(args)
    )
    start = perf_counter()
    with Generator.from_pretrained(args.model, max_batch_size=args.n, **model_arguments(args)) as generator:
        load_seconds = perf_counter() - start
        if args.json or args.n > 1:
            result = generator.generate(prompt, params)
            generations = result if isinstance(result, list) else [result]
            _print(generations, args.json)
        else:
            generations = [_stream(generator, prompt, params)]
    if not args.quiet:
        print_timings(generations, load_seconds)


def _print(generations: list[Generation], as_json: bool) -> None:
    if as_json:
        records = [asdict(generation) for generation in generations]
        print(json.dumps(records if len(records) > 1 else records[0], ensure_ascii=False))
    else:
        print("\n\n".join(generation.text or "" for generation in generations))


def _stream(generator: Generator, prompt: str, params: SamplingParams) -> Generation:
    generation = None
    with generator.stream(prompt, params) as chunks:
        for chunk in chunks:
            print(chunk.text, end="", flush=True)
            generation = chunk.generation
    print()
    if generation is None:
        raise GenerationError("the stream ended without its result")
    return generation
