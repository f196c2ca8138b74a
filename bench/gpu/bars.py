"""What the GPU kernels and the GPU engine are expected to reach on one H100: the only place with these numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Quantity = Literal["percent", "rate", "ratio"]
_TEXTS = {"percent": "{:g} % of the ceiling", "rate": "{:g} TFLOP/s", "ratio": "{:g} x the best peer"}


@dataclass(frozen=True)
class Bar:
    """percent: of the ceiling measured in the same run; rate: in 10^12 a second; ratio: speed by that of a peer."""

    quantity: Quantity
    least: float

    @property
    def text(self) -> str:
        return "at least " + _TEXTS[self.quantity].format(self.least)


AS_FAST_AS_PEERS = Bar("ratio", 1.0)  # of every row that has peers
BARS: dict[str, tuple[Bar, ...]] = {
    "attention_prefill head_dim 256": (Bar("rate", 450), Bar("ratio", 1.2)),
    "attention_decode": (Bar("percent", 80),),
    "geglu": (Bar("percent", 90),),
    "matmul bfloat16": (Bar("percent", 92),),
    "matmul int8": (Bar("percent", 85),),
    "matmul int4": (Bar("percent", 70),),
    "decode 2b bfloat16": (Bar("percent", 80),),
    "decode 9b bfloat16": (Bar("percent", 92),),
    "decode 9b int8": (Bar("percent", 75),),
    "decode 27b bfloat16": (Bar("percent", 92),),
    "prefill 9b bfloat16": (Bar("percent", 60),),
    "decode recurrentgemma-2b bfloat16": (Bar("ratio", 0.95),),  # after a long prompt; the peer: after a short one
}


def bars_of(what: str) -> tuple[Bar, ...]:
    return BARS.get(what, ())
