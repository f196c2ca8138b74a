"""One engine in a process of its own: `python bench/workers ENGINE SETTINGS`, commands and answers as lines of JSON.

It runs under whatever interpreter has the engine, so nothing here needs gemma2_fast. Every engine is a module
`ENGINE_engine` beside this file with load(settings); what it returns answers the commands of Engine.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, Protocol


class Engine(Protocol):
    """One loaded model. Prompts are random ids; every call starts with an empty cache.

    versions: of the packages that compute.
    """

    versions: dict[str, str]

    def prefill(self, tokens: int) -> float:
        """Seconds from a prompt of `tokens` to the logits of its last position."""

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Seconds of `steps` steps of `batch` sequences together, each after a prompt of `context` tokens."""

    def begin(self, context: int, steps: int) -> None:
        """Start a generation of one token and then `steps` more, and wait for the one."""

    def advance(self, steps: int) -> float:
        """Seconds of its next steps, since the end of those before."""

    def likeliest(self, ids: list[int]) -> list[tuple[int, float]]:
        """The five likeliest next ids with their logits, likeliest first."""


COMMANDS = ("prefill", "decode", "begin", "advance", "likeliest", "encode")
# Of this process: resident memory at its highest, and what of it is now not of files.
MEMORY = {"peak_bytes": "VmHWM:", "anonymous_bytes": "RssAnon:"}


def memory() -> dict[str, int]:
    with open("/proc/self/status", encoding="ascii") as status:
        lines = {name: rest for name, *rest in map(str.split, status)}
    return {name: 1024 * int(lines[line][0]) for name, line in MEMORY.items()}


def main() -> None:
    # Libraries print to standard output too; they get the one for errors.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(**fields: Any) -> None:
        replies.write(json.dumps({**fields, **memory()}) + "\n")

    try:
        start = time.perf_counter()
        engine: Engine = importlib.import_module(f"{sys.argv[1]}_engine").load(json.loads(sys.argv[2]))
        reply(load_s=time.perf_counter() - start, versions=engine.versions)
        for line in sys.stdin:
            command = json.loads(line)
            name = command.pop("do")
            if name not in COMMANDS or not hasattr(engine, name):
                raise ValueError(f"this engine has no command {name!r}")
            reply(value=getattr(engine, name)(**command))
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    main()
