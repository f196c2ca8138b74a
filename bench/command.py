"""What every bench command shares: `gemma2-fast bench NAME` and `python -m gemma2_fast.bench.NAME` are the same."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gemma2_fast.errors import Gemma2FastError

AddArguments = Callable[[argparse.ArgumentParser], None]


def main(doc: str | None, add_arguments: AddArguments, run: Callable[[argparse.Namespace], None]) -> int:
    """The body of `python -m`; returns the exit code, with one line for an error of ours."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        run(parser.parse_args())
    except (Gemma2FastError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result to this file")


def add_threads(parser: argparse.ArgumentParser) -> None:
    default = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=positive, default=default, metavar="N", help=f"default: {default}")


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return number


def counts(text: str) -> list[int]:
    """Comma-separated positive whole numbers."""
    return [positive(part) for part in text.split(",")]


def some_of(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    """A type for argparse: comma-separated names out of `known`."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown {what} {unknown[0]!r}: expected some of {', '.join(known)}")
        return names

    return parse


def key_values(parts: Sequence[str]) -> dict[str, str]:
    pairs = [part.partition("=") for part in parts]
    if wrong := [key for key, equals, _ in pairs if not key or not equals]:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {wrong[0]!r}")
    return {key: value for key, _, value in pairs}
