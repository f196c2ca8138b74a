"""JSON as checkpoints must write it: one object, no key twice, nothing that is not JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import NoReturn

from gemma2_fast.errors import FileFormatError
from gemma2_fast.weights.messages import quoted


def load_json_object(text: bytes, where: str) -> dict[str, object]:
    """The object that `text` holds; FileFormatError, opened by `where`, for anything else."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise FileFormatError(f"{where}: the key {quoted(twice)} stands there twice")
        for pair in pairs:
            for item in pair:
                if isinstance(item, str):
                    item.encode()  # a lone surrogate could never be printed or written again
        return result

    def refuse_constant(name: str) -> NoReturn:
        raise FileFormatError(f"{where}: {name} is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except FileFormatError:
        raise
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{where}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise FileFormatError(f"{where}: JSON nested too deeply") from None
    except ValueError as error:
        raise FileFormatError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FileFormatError(f"{where}: expected a JSON object, got a {type(value).__name__}")
    return value
