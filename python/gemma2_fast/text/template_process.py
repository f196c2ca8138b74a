"""Renders an untrusted template in a process of its own, under a limit of time, memory and output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

from gemma2_fast.errors import ChatError

_WORKER = Path(__file__).with_name("template_worker.py")
_PASSED_ON = ("LD_LIBRARY_PATH", "PYTHONHOME", "TZ", "SYSTEMROOT")  # no tokens or keys reach the template's process


class TemplateProcess:
    """A thread cannot be stopped from outside, and a trace function does not see a loop inside C code; a process can be
    ended at any point. It starts with the first render (a tenth of a second) and serves the next ones in a millisecond.
    """

    def __init__(self, template: str, *, time_limit_s: float) -> None:
        self._template = template
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner_pid = 0
        self._finalizer: weakref.finalize[[subprocess.Popen[bytes]], TemplateProcess] | None = None

    def render(self, variables: Mapping[str, object], *, max_characters: int) -> str:
        request = {
            "template": self._template,
            "variables": variables,
            "time_limit_s": self._time_limit_s,
            "max_characters": max_characters,
        }
        with self._lock:
            reply = self._exchange(json.dumps(request).encode() + b"\n")
        if "error" in reply:
            raise ChatError(f"the chat template failed: {reply['error']}")
        return reply["text"]

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _exchange(self, request: bytes) -> dict[str, str]:
        child = self._running_child()
        assert child.stdin is not None  # both are pipes
        assert child.stdout is not None
        try:
            child.stdin.write(request)
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # Ctrl-C: a reply left unread would answer the next request
            self._stop()
            raise
        if line.endswith(b"\n"):
            reply: dict[str, str] = json.loads(line)
            return reply
        code = child.wait()
        self._stop()
        if code == -signal.SIGALRM:
            raise ChatError(
                f"the chat template did not finish within {self._time_limit_s} s and was stopped; "
                "use another template, or the built-in format"
            )
        raise ChatError(f"the chat template's process ended with code {code}; use the built-in format")

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._owner_pid == os.getpid() and self._child.poll() is None:
            return self._child
        if self._owner_pid != os.getpid() and self._finalizer is not None:
            self._finalizer.detach()  # after a fork the child belongs to the parent
            self._child = None
        self._stop()
        if not sys.executable:
            raise ChatError("a chat template needs a Python program to run in, and sys.executable is empty")
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._child = subprocess.Popen(
            [sys.executable, "-S", "-P", "-B", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C at the terminal is for the program, not for this process
        )
        self._owner_pid = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._child)
        return self._child

    def _stop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._child = None
        self._finalizer = None


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that the process did not live to read
                pipe.close()
