"""Every exception the package raises on purpose."""

from __future__ import annotations


class Gemma2FastError(Exception):
    """Base of the package's own exceptions."""


class FileFormatError(Gemma2FastError, ValueError):
    """A file breaks the rules of its own format (safetensors, GGUF, tokenizer, JSON)."""


class ConfigError(Gemma2FastError, ValueError):
    """A model configuration is incomplete, contradictory or of an unsupported family."""


class WeightsError(Gemma2FastError, ValueError):
    """Tensors are missing, unexpected or misshapen; the message lists all of them at once."""


class TokenizerError(Gemma2FastError, ValueError):
    """No usable tokenizer, or text it cannot take."""


class ChatError(Gemma2FastError, ValueError):
    """A conversation that the chat format refuses, or a template that fails."""


class RequestError(Gemma2FastError, ValueError):
    """A prompt or a parameter that can never be served as it stands."""


class CapacityError(Gemma2FastError, MemoryError):
    """More memory, cache blocks or slots than there are."""


class BackendError(Gemma2FastError, RuntimeError):
    """A backend, instruction set or option that this machine or build cannot take."""


class HubError(Gemma2FastError, OSError):
    """A model could not be had from the hub: not found, gated, or no network."""


class GenerationError(Gemma2FastError, RuntimeError):
    """A request ended because its step failed or its logits were not finite; other requests go on.

    completed: for a batch, its members in order: a Generation, or None for one that failed too.
    """

    completed: tuple[object, ...] = ()
