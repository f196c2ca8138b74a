"""Names and values from files in error messages: a hostile one must not blow the message up."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

MAX_ITEMS = 8

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120


def quoted(value: object) -> str:
    """`value` as a literal, cut to a readable length and depth."""
    return _short.repr(value)


def listed(items: Sequence[str]) -> str:
    """The first of `items`, and how many more there are."""
    first = ", ".join(items[:MAX_ITEMS])
    return first if len(items) <= MAX_ITEMS else f"{first} and {len(items) - MAX_ITEMS} more"
