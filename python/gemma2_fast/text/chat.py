"""A conversation to ids: the checkpoint's own template, or the built-in Gemma turns."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence

from gemma2_fast.errors import ChatError
from gemma2_fast.text.pieces import BOS, EOS, PAD, UNKNOWN
from gemma2_fast.text.template_process import TemplateProcess
from gemma2_fast.text.tokenizer import Tokenizer, check_text

_USER, _MODEL, _SYSTEM = "user", "model", "system"
_ROLES = {"user": _USER, "assistant": _MODEL, "model": _MODEL, "system": _SYSTEM}

Turns = list[tuple[str, str]]  # (role, text), user and model alternating


class ChatFormat:
    """`render` gives the ids of a conversation: exactly one BOS, and control ids from the format only.

    Contents are stripped of surrounding whitespace, as Gemma's templates do. A leading system message becomes the start
    of the first user turn, followed by a blank line, as Gemma 3's template does.
    """

    def __init__(self, template: str | None, tokenizer: Tokenizer, *, time_limit_s: float = 5.0) -> None:
        self._tokenizer = tokenizer
        self._template = None if template is None else _SafeTemplate(template, tokenizer, time_limit_s)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        strict_system: bool = False,
    ) -> list[int]:
        turns = _turns(messages, strict_system=strict_system)
        for _, text in turns:
            check_text(text)
        if self._template is not None:
            return self._template.render(turns, add_generation_prompt)
        return self._render_built_in(turns, add_generation_prompt)

    def _render_built_in(self, turns: Turns, add_generation_prompt: bool) -> list[int]:
        tokenizer = self._tokenizer
        ids = [tokenizer.bos_id]
        for role, text in turns:
            ids.append(tokenizer.start_of_turn_id)
            ids += tokenizer.encode_content(f"{role}\n{text.strip()}")
            ids.append(tokenizer.end_of_turn_id)
            ids += tokenizer.encode_content("\n")
        if add_generation_prompt:
            ids.append(tokenizer.start_of_turn_id)
            ids += tokenizer.encode_content(f"{_MODEL}\n")
        return ids


class _SafeTemplate:
    """The markers in the template's source are replaced by stand-ins that nobody can guess, and after rendering only
    these count as markers: whatever the contents spell, alone or together with the template's text, stays text.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, time_limit_s: float) -> None:
        self._tokenizer = tokenizer
        # 128 random bits, in private-use characters
        nonce = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(8))
        stand_in = f"{nonce}{{token_id}}{nonce}"
        self._stand_ins = re.compile(f"{nonce}([0-9]+){nonce}")
        self._variables = {
            "bos_token": stand_in.format(token_id=tokenizer.bos_id),
            "eos_token": stand_in.format(token_id=tokenizer.eos_id),
            "pad_token": stand_in.format(token_id=tokenizer.pad_id),
            "unk_token": UNKNOWN,
        }
        for name, spelling in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD)):
            source = source.replace(spelling, self._variables[name])
        source = tokenizer.replace_markers(source, stand_in)
        self._process = TemplateProcess(source, time_limit_s=time_limit_s)

    def render(self, turns: Turns, add_generation_prompt: bool) -> list[int]:
        # templates know the model's turns as the assistant's
        messages = [{"role": "assistant" if role == _MODEL else role, "content": text} for role, text in turns]
        written = sum(len(text) for _, text in turns)
        rendered = self._process.render(
            {**self._variables, "messages": messages, "add_generation_prompt": add_generation_prompt},
            max_characters=100_000 + 1_000 * len(turns) + 4 * written,
        )
        first_text, *rest = self._stand_ins.split(rendered)
        ids = self._tokenizer.encode_content(first_text)
        for token_id, text in zip(map(int, rest[::2]), rest[1::2], strict=True):
            ids.append(token_id)
            ids += self._tokenizer.encode_content(text)
        bos_id = self._tokenizer.bos_id
        if bos_id in ids[1:]:
            raise ChatError(
                f"the chat template writes {BOS} after the start of the text; the model expects it once, first"
            )
        return ids if ids[:1] == [bos_id] else [bos_id, *ids]


def _turns(messages: Sequence[Mapping[str, object]], *, strict_system: bool) -> Turns:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a list of {{'role', 'content'}} objects, got {type(messages).__name__}")
    turns = [_turn(index, message) for index, message in enumerate(messages)]
    if turns and turns[0][0] == _SYSTEM:
        turns = _fold_system(turns, strict=strict_system)
    if not turns:
        raise ChatError("messages is empty: a conversation needs at least one user message")
    for index, (role, _) in enumerate(turns):
        expected = (_USER, _MODEL)[index % 2]
        if role != expected:
            raise ChatError(
                f"roles must alternate user and model, user first (a system message may lead): turn {index} is by "
                f"{role!r}, expected {expected!r}; join consecutive messages of one role"
            )
    return turns


def _turn(index: int, message: object) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise ChatError(f"message {index} is a {type(message).__name__}, expected an object with a role and a content")
    unknown = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if unknown:
        raise ChatError(f"message {index} has {unknown}, which the Gemma format has no place for; remove them")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ChatError(f"message {index} has the role {role!r}, expected one of {', '.join(_ROLES)}")
    return _ROLES[role], _text(index, message.get("content"))


def _text(index: int, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ChatError(
            f"message {index} has a content of type {type(content).__name__}, expected text or a list of parts"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise ChatError(f'message {index} has the part {part!r:.100}, expected {{"type": "text", "text": "…"}}')
        texts.append(text)
    return "".join(texts)


def _fold_system(turns: Turns, *, strict: bool) -> Turns:
    if strict:
        raise ChatError("the Gemma format has no system role; put the instructions into the first user message")
    if len(turns) < 2 or turns[1][0] != _USER:
        raise ChatError("a system message must be followed by the user message it is put in front of")
    system, (_, text) = turns[0][1].strip(), turns[1]
    return [(_USER, f"{system}\n\n{text.strip()}" if system else text), *turns[2:]]
