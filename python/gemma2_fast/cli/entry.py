"""Picks the command and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from gemma2_fast import __version__
from gemma2_fast.cli import bench, chat, generate, info, quantize, tokenize
from gemma2_fast.errors import Gemma2FastError

COMMANDS = (generate, chat, info, tokenize, quantize, bench)

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it; argparse itself exits with 2 on wrong usage


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parse(arguments)
    logging.basicConfig(format="gemma2-fast: %(message)s", level=logging.WARNING)
    logging.getLogger("gemma2_fast").setLevel(logging.WARNING if args.quiet else logging.INFO)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; the interpreter must not meet the broken pipe again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        if args.traceback:
            raise
        print(f"gemma2-fast: error: {_one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_OK


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, Gemma2FastError | OSError | ValueError) and message:
        return message
    return f"{type(error).__name__}: {message} (--traceback shows where)"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """argparse gives up on `MODEL --option TEXT`: it has settled that there is no TEXT before it meets the option."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest[:1] == ["--"] and len(rest) == 2 and getattr(args, "text", "") is None:
        args.text, rest = rest[1], []
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(args, "text", "") is None:
        args.text = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemma2-fast", description="Run Google's open Gemma models.")
    parser.add_argument("--version", action="version", version=f"gemma2-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
