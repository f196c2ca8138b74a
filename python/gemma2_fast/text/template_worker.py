"""The process that renders a checkpoint's Jinja template. It is run as a script, and imports nothing of the package.

One JSON request a line comes in, one JSON reply a line goes out. A render that passes its time is ended by the kernel's
alarm, which stops C code too; the memory a template can take is bounded by the address space.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

_ADDRESS_SPACE_BYTES = 1 << 30


class OutputTooLarge(Exception):
    pass


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
        """Raises at once: the default prints as nothing and fails only on use."""
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__!r} is refused")


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


@lru_cache(maxsize=1)
def _compiled(source: str) -> Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json  # the default one escapes for HTML
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(source)


def render(source: str, variables: Mapping[str, Any], max_characters: int) -> str:
    parts: list[str] = []
    room = max_characters
    for part in _compiled(source).generate(variables):
        room -= len(part)
        if room < 0:
            raise OutputTooLarge(f"its output passes {max_characters} characters")
        parts.append(part)
    return "".join(parts)


def main() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = _ADDRESS_SPACE_BYTES if most == resource.RLIM_INFINITY else min(most, _ADDRESS_SPACE_BYTES)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["time_limit_s"])
        try:
            reply = {"text": render(request["template"], request["variables"], request["max_characters"])}
        except Exception as error:  # whatever a template can raise is the caller's to report
            reply = {"error": f"{type(error).__name__}: {error}"[:1000]}
        encoded = json.dumps(reply).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(encoded + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
