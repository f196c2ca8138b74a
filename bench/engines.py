"""Engines to be timed, each a process of its own that loads its model once and then does what it is told."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gemma2_fast.errors import BackendError

WORKERS = Path(__file__).resolve().parent / "workers"
OURS = "gemma2_fast"
PEERS = ("llama_cpp", "openvino", "ctranslate2", "transformers", "recurrentgemma")

# A thread pool spins for a while after its work. The next engine starts when all others have stopped.
IDLE_WINDOW_SECONDS = 0.03
IDLE_SHARE = 0.1
IDLE_TIMEOUT_SECONDS = 10.0
ANSWER_TIMEOUT_SECONDS = 1800.0
CLOSE_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True)
class EngineSpec:
    """What to start. label: its name in tables; settings: as the worker takes them."""

    label: str
    kind: str
    settings: Mapping[str, Any]
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    workers: Path = WORKERS


class Engine:
    """A running worker. Its commands raise BackendError when it fails, ends or does not answer."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 — as long as the process
        command = [spec.python, str(spec.workers), spec.kind, json.dumps(dict(spec.settings))]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **spec.environment},
                text=True,
            )
        except OSError as error:
            self._errors.close()
            raise BackendError(f"{spec.label}: cannot start {spec.python}: {error}") from error
        if self._process.stdin is None or self._process.stdout is None:
            raise BackendError(f"{spec.label}: the process has no pipes")
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        try:
            greeting = self._answer()
        except BaseException:
            self.close()
            raise
        self.load_s = float(greeting["load_s"])
        self.versions: dict[str, str] = greeting["versions"]
        self.peak_bytes, self.anonymous_bytes = int(greeting["peak_bytes"]), int(greeting["anonymous_bytes"])

    def prefill(self, tokens: int) -> float:
        return float(self._ask("prefill", tokens=tokens))

    def decode(self, batch: int, context: int, steps: int) -> float:
        return float(self._ask("decode", batch=batch, context=context, steps=steps))

    def begin(self, context: int, steps: int) -> None:
        self._ask("begin", context=context, steps=steps)

    def advance(self, steps: int) -> float:
        return float(self._ask("advance", steps=steps))

    def likeliest(self, ids: Sequence[int]) -> list[tuple[int, float]]:
        return [(token_id, logit) for token_id, logit in self._ask("likeliest", ids=list(ids))]

    def encode(self, text: str) -> list[int]:
        return list(self._ask("encode", text=text))

    def cpu_seconds(self) -> float:
        """What all threads of the process have computed so far."""
        total = 0
        for task in Path(f"/proc/{self._process.pid}/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[0])
            except OSError:
                continue  # the thread has just ended
        return total / 1e9

    def close(self) -> None:
        """The worker's loop ends with its input."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(timeout=CLOSE_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stdout.close()
        self._errors.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, command: str, **arguments: Any) -> Any:
        line = json.dumps({"do": command, **arguments}) + "\n"
        try:
            self._stdin.write(line)
            self._stdin.flush()
        except BrokenPipeError:
            raise self._failure("has ended") from None
        return self._answer()["value"]

    def _answer(self) -> dict[str, Any]:
        if not select.select([self._stdout], [], [], ANSWER_TIMEOUT_SECONDS)[0]:
            raise self._failure(f"has not answered for {ANSWER_TIMEOUT_SECONDS:.0f} s")
        line = self._stdout.readline()
        if not line:
            raise self._failure(f"ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            hint = "; is it installed there? see bench/README.md" if "ModuleNotFoundError" in answer["error"] else ""
            raise BackendError(f"{self.spec.label} ({self.spec.python}): {answer['error']}{hint}")
        self.peak_bytes, self.anonymous_bytes = int(answer["peak_bytes"]), int(answer["anonymous_bytes"])
        return answer

    def _failure(self, what: str) -> BackendError:
        self._errors.seek(0)
        last_lines = " | ".join(self._errors.read()[-2000:].strip().splitlines()[-5:])
        return BackendError(f"{self.spec.label} {what}; the last it said: {last_lines or 'nothing'}")


def wait_until_idle(engines: Sequence[Engine]) -> None:
    """Returns once no engine computes; BackendError names one that never stops."""
    deadline = time.monotonic() + IDLE_TIMEOUT_SECONDS
    for engine in engines:
        while True:
            before = engine.cpu_seconds()
            time.sleep(IDLE_WINDOW_SECONDS)
            if engine.cpu_seconds() - before < IDLE_SHARE * IDLE_WINDOW_SECONDS:
                break
            if time.monotonic() > deadline:
                raise BackendError(
                    f"{engine.spec.label} still computes {IDLE_TIMEOUT_SECONDS:.0f} s after its work; "
                    "let its threads sleep: for OpenMP, with env.OMP_WAIT_POLICY=passive among the peer's options"
                )
