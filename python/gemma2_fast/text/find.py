"""The tokenizer and the chat template among the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gemma2_fast.errors import ChatError, FileFormatError
from gemma2_fast.text.pieces import SPACE, is_marker
from gemma2_fast.text.sentencepiece_proto import AddedToken
from gemma2_fast.text.tokenizer import Tokenizer
from gemma2_fast.weights.strict_json import load_json_object

# In the order of preference. sentencepiece is what the models were trained with; a published tokenizer.json lacks some
# of its pieces, and loads ten times slower.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")

_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_GGUF_TEMPLATE = "tokenizer.chat_template"


def find_tokenizer(directory: Path | str) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None if it has none of TOKENIZER_FILES.

    Tokens that tokenizer_config.json adds to tokenizer.model, or renames in it (markers of images and of fine-tuned
    models), are honoured.
    """
    directory = Path(directory)
    for name in TOKENIZER_FILES:
        path = directory / name
        if path.is_file():
            added = _added_tokens(directory) if name == "tokenizer.model" else None
            return Tokenizer.from_file(path, added_tokens=added)
    return None


def find_chat_template(directory: Path | str) -> str | None:
    """The Jinja template of a checkpoint directory, from chat_template.jinja or else tokenizer_config.json."""
    path = Path(directory) / _TEMPLATE_FILE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path}: not UTF-8 at byte {error.start}") from None
    return _one_template(_read_config(Path(directory)).get("chat_template"), source=_CONFIG_FILE)


def chat_template_from_gguf(metadata: Mapping[str, object]) -> str | None:
    return _one_template(metadata.get(_GGUF_TEMPLATE), source=_GGUF_TEMPLATE)


def _one_template(value: object, *, source: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        default = named.get("default")
        if isinstance(default, str):
            return default
    raise ChatError(f"{source}: chat_template must be a string or a list with one named 'default', got {value!r:.100}")


def _added_tokens(directory: Path) -> dict[int, AddedToken]:
    entries = _read_config(directory).get("added_tokens_decoder", {})
    if not isinstance(entries, dict):
        raise FileFormatError(
            f"{directory / _CONFIG_FILE}: added_tokens_decoder must be an object, got {entries!r:.100}"
        )
    return {_integer(key, directory): _added_token(value, directory) for key, value in entries.items()}


def _integer(key: str, directory: Path) -> int:
    if not key.isdecimal():
        raise FileFormatError(f"{directory / _CONFIG_FILE}: added_tokens_decoder has the key {key!r}, expected an id")
    return int(key)


def _added_token(value: object, directory: Path) -> AddedToken:
    text = value.get("content") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(text, str):
        raise FileFormatError(
            f"{directory / _CONFIG_FILE}: added_tokens_decoder holds {value!r:.100}, expected an object with a content"
        )
    return AddedToken(text.replace(" ", SPACE), is_marker(text) or bool(value.get("special")))


def _read_config(directory: Path) -> dict[str, object]:
    path = directory / _CONFIG_FILE
    if not path.is_file():
        return {}
    return load_json_object(path.read_bytes(), str(path))
