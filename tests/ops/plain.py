"""The ops in plain NumPy, in the dtype of their inputs: float64 for the exact result, float32 for the usual error.

The options after the star make mutants: the op with one mistake that runtimes have made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]


def exact_and_plain(op: Callable[..., Floats], *arrays: Floats, **options: Any) -> tuple[Floats, Floats]:
    """The op in float64 and in float32 on the same inputs."""
    return op(*(a.astype(np.float64) for a in arrays), **options), op(*arrays, **options)


def rms_norm(x: Floats, gain: Floats, *, epsilon: float) -> Floats:
    dtype = x.dtype.type
    mean_square = np.mean(x * x, axis=-1, keepdims=True, dtype=x.dtype)
    return x / np.sqrt(mean_square + dtype(epsilon)) * gain


def softcap(x: Floats, *, cap: float) -> Floats:
    return x.dtype.type(cap) * np.tanh(x / x.dtype.type(cap))


def gelu_tanh(x: Floats) -> Floats:
    number = x.dtype.type
    return number(0.5) * x * (1 + np.tanh(number(math.sqrt(2 / math.pi)) * (x + number(0.044715) * x**3)))


def gelu_erf(x: Floats) -> Floats:
    return x * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x).astype(x.dtype)


def geglu(gate: Floats, up: Floats) -> Floats:
    return gelu_tanh(gate) * up


def rope(x: Floats, cos: Floats, sin: Floats, *, interleaved: bool = False) -> Floats:
    """x: [T, heads, D]; cos, sin: [T, pairs]."""
    pairs = cos.shape[1]
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    a, b, c, s = x[..., first], x[..., second], cos[:, None], sin[:, None]
    out = x.copy()
    out[..., first] = a * c - b * s
    out[..., second] = b * c + a * s
    return out


def conv1d(x: Floats, weights: Floats, bias: Floats, tail: Floats) -> Floats:
    """x: [T, R]; weights: [taps, R]; tail: [taps - 1, R]."""
    inputs = np.concatenate([tail, x])
    return bias + sum(tap * inputs[i : i + len(x)] for i, tap in enumerate(weights))


def sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def rg_lru(
    x: Floats,
    input_gate: Floats,
    recurrence_gate: Floats,
    log_decay: Floats,
    state: Floats,
    *,
    starts: bool,
    damped: bool = True,
    bfloat16_state: bool = False,
) -> Floats:
    """x and gates: [T, R]; log_decay and state: [R]."""
    log_a = log_decay * sigmoid(recurrence_gate)
    a = np.exp(log_a)
    damping = np.sqrt(1 - np.exp(2 * log_a)) if damped else np.ones_like(a)
    if starts:
        a[0], damping[0] = 0, 1
    out = np.empty_like(x)
    for t, added in enumerate(x * sigmoid(input_gate) * damping):
        state = a[t] * state + added
        if bfloat16_state:
            state = (state.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(x.dtype)
        out[t] = state
    return out


def attention(
    queries: Floats,
    keys: Floats,
    values: Floats,
    *,
    first_position: int,
    scale: float,
    cap: float | None = None,
    window: int | None = None,
    cap_after_mask: bool = False,
    sees_ahead: int = 0,
) -> Floats:
    """queries: [T, G, D]; keys, values: [positions, D]; each query sees its window of positions up to its own."""
    number = queries.dtype.type
    position = first_position + np.arange(len(queries))[:, None, None]
    key = np.arange(len(keys))[None, None, :]
    visible = key <= position + sees_ahead
    if window is not None:
        visible &= key > position - window
    scores = (queries @ keys.T) * number(scale)
    if cap_after_mask and cap is not None:
        scores = softcap(np.where(visible, scores, number(-1e30)), cap=cap)
    else:
        if cap is not None:
            scores = softcap(scores, cap=cap)
        scores = np.where(visible, scores, number(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights @ values) / weights.sum(axis=-1, keepdims=True)


def attention_int8(queries: Floats, keys: Floats, codes: Floats, scales: Floats, **rule: Any) -> Floats:
    """As `attention` rounds over int8 pages: queries to 16 bits a row, weights to 15 bits a row and 256 keys.

    values = codes * scales [positions, 1]; what is rounded is weight * scale.
    """
    units = np.abs(queries).max(axis=-1, keepdims=True) / queries.dtype.type(32639)
    rounded = np.rint(queries / np.where(units > 0, units, 1)) * units
    # With the unit matrix for values, attention gives the weights themselves.
    scaled = attention(rounded, keys, np.eye(len(keys), dtype=keys.dtype), **rule) * scales[:, 0]
    sums = np.zeros_like(queries)
    for begin in range(0, len(keys), 256):
        block = scaled[..., begin : begin + 256]
        unit = block.max(axis=-1, keepdims=True) / queries.dtype.type(32767)
        sums += np.rint(block / np.where(unit > 0, unit, 1)) @ codes[begin : begin + 256] * unit
    return sums
