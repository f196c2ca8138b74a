"""The gated activation of the MLP."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """out = gelu_tanh(gate) * up, with gelu_tanh(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3))).

    gate, up and out [..., F] in one dtype. Rounds: the activation and the product, each to the dtype.
    Errors: ValueError when the shapes differ.
    Source: Shazeer 2020, "GLU Variants Improve Transformer"; the tanh form is the one the models were trained with.
    """
    if gate.shape != up.shape:
        raise ValueError(f"geglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    return functional.gelu(gate, approximate="tanh") * up
