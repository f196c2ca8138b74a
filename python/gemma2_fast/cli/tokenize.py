"""gemma2-fast tokenize: text → ids and pieces, and back."""

from __future__ import annotations

import argparse
import json
from typing import Any

from gemma2_fast import Generator
from gemma2_fast.cli.options import Subparsers, add_common, add_hub_options, add_text, model_arguments, read_text
from gemma2_fast.errors import RequestError, TokenizerError
from gemma2_fast.generator import load_text
from gemma2_fast.text import TOKENIZER_FILES


def add_parser(commands: Subparsers[Any]) -> None:
    parser = commands.add_parser(
        "tokenize",
        help="show the token ids of a text, or the text of ids",
        description="Show the token ids and pieces of a text, or with --decode the text of ids.",
    )
    add_common(parser)
    add_text(parser, "TEXT")
    parser.add_argument("--decode", action="store_true", help="the text is ids, separated by spaces or commas")
    parser.add_argument("--no-bos", action="store_true", help="leave out the id that begins every prompt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_hub_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    text = read_text(args)
    checkpoint = Generator.describe(args.model, **model_arguments(args)).checkpoint
    tokenizer, _ = load_text(checkpoint)
    if tokenizer is None:
        raise TokenizerError(f"{checkpoint.path} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")
    if args.decode:
        ids = _ids(text)
        decoded = tokenizer.decode(ids)
        print(json.dumps({"ids": ids, "text": decoded}, ensure_ascii=False) if args.json else decoded)
        return
    ids = tokenizer.encode(text, add_bos=not args.no_bos)
    pieces = [tokenizer.piece_bytes(token_id).decode("utf-8", errors="backslashreplace") for token_id in ids]
    if args.json:
        print(json.dumps({"ids": ids, "pieces": pieces}, ensure_ascii=False))
    else:
        for token_id, piece in zip(ids, pieces, strict=True):
            print(f"{token_id:>7}  {piece!r}")


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise RequestError(f"--decode takes ids, separated by spaces or commas: {error}") from error
