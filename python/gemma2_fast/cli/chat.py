"""gemma2-fast chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from typing import Any

from gemma2_fast import Generator, SamplingParams
from gemma2_fast.cli.options import (
    Subparsers,
    add_common,
    add_model_options,
    add_sampling_options,
    model_arguments,
    sampling_arguments,
)
from gemma2_fast.cli.report import print_timings
from gemma2_fast.errors import Gemma2FastError

HELP = """\
/help     this list
/history  the conversation so far
/reset    forget the conversation
/exit     leave (so does Ctrl-D)
Ctrl-C    stop the reply that is being written"""

Message = dict[str, str]


def add_parser(commands: Subparsers[Any]) -> None:
    parser = commands.add_parser("chat", help="talk with a model", description="Talk with a model, turn by turn.")
    add_common(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions that stand before the conversation")
    add_sampling_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    params = SamplingParams(**sampling_arguments(args))
    with Generator.from_pretrained(args.model, max_batch_size=1, **model_arguments(args)) as generator:
        Conversation(generator, params, args.system, args.quiet).run()


class Conversation:
    """What has been said, and the loop that adds to it."""

    def __init__(self, generator: Generator, params: SamplingParams, system: str | None, quiet: bool) -> None:
        self._generator = generator
        self._params = params
        self._opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._opening)
        self._quiet = quiet
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        """Read lines until /exit or the end of input. Ctrl-C never leaves."""
        if self._interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  gives input() line editing and a history
            if not self._quiet:
                print("Type a message, or /help.", file=sys.stderr)
        while True:
            try:
                line = input("> " if self._interactive else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
                continue
            if line == "/exit":
                return
            with suppress(KeyboardInterrupt):  # between the reply and the next prompt there is nothing left to stop
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._turn(line)

    def _command(self, line: str) -> None:
        match line:
            case "/help":
                print(HELP)
            case "/history":
                for message in self._messages:
                    print(f"{message['role']}: {message['content']}")
            case "/reset":
                self._messages = list(self._opening)
                print("(forgotten)")
            case _:
                print(f"{line}: no such command; /help lists them", file=sys.stderr)

    def _turn(self, text: str) -> None:
        """One message and its reply. A turn without a reply is taken back; a stopped reply keeps what was written."""
        messages = [*self._messages, {"role": "user", "content": text}]
        reply = ""
        generation = None
        try:
            with self._generator.chat(messages, self._params, stream=True) as chunks:
                for chunk in chunks:
                    print(chunk.text, end="", flush=True)
                    reply += chunk.text
                    generation = chunk.generation
        except KeyboardInterrupt:
            print(" (stopped)", end="", file=sys.stderr)
        except Gemma2FastError as error:
            print(f"gemma2-fast: error: {error}", file=sys.stderr)
            return
        print(flush=True)
        if not reply:
            return
        self._messages = [*messages, {"role": "assistant", "content": reply}]
        if generation is not None and not self._quiet:
            print_timings([generation])
