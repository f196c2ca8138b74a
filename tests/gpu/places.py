"""Where a test of kernels runs: a card, or Triton's interpreter, which shows that the test itself is right."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gemma2_fast.triton_kernels.tuning import tuned

GPU_WANTED = os.environ.get("GEMMA2_FAST_GPU") == "1"  # set by `make gpu`

# Of an op in the interpreter, in place of tuning.json.
SMALL_BLOCKS = {
    "attention_prefill": {"tile": 16, "block": 16},
    "attention_decode": {"block": 16},
    "matmul": {"rows": 16, "cols": 128},
    "matmul_tiled": {"tile_tokens": 16, "tile_rows": 32, "cols": 128},
    "rg_lru_gates": {"tile_tokens": 16, "tile_channels": 16, "cols": 16},
    "rg_lru_scan": {"channels": 16, "chunk": 8},
    "rg_lru_step": {"channels": 16, "cols": 16},
}


@dataclass(frozen=True)
class Place:
    """device: of torch. dtype: of what kernels read and write; the interpreter computes bfloat16 wrongly."""

    device: str
    dtype: torch.dtype
    page_tokens: int

    def draw(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers, of which a seed that depends on the shape alone makes the same everywhere."""
        generator = torch.Generator().manual_seed(sum(size * 31**i for i, size in enumerate(shape)) % 2**31)
        if self.device != "cpu":
            generator = torch.Generator(self.device).manual_seed(generator.initial_seed())
        return (scale * torch.randn(shape, generator=generator, device=self.device)).to(dtype or self.dtype)

    def ints(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)

    def nothing(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """NaN, so that what is not written shows."""
        return torch.full(shape, torch.nan, dtype=dtype or self.dtype, device=self.device)

    def sizes(self, op: str, **shape: int) -> dict[str, int]:
        """Of blocks, and of warps and stages, as arguments of the op's launcher. shape: as tuning.json names it."""
        if self is INTERPRETER:
            return dict(SMALL_BLOCKS[op])
        major, minor = torch.cuda.get_device_capability()
        sizes = tuned(op, 10 * major + minor, **shape)
        blocks = {name.lower(): size for name, size in sizes.constants.items()}
        return {**blocks, "num_warps": sizes.num_warps, "num_stages": sizes.num_stages}


CARD = Place("cuda", torch.bfloat16, page_tokens=64)
INTERPRETER = Place("cpu", torch.float32, page_tokens=16)


def cases(on_card: Mapping[str, Any], interpreted: Mapping[str, Any]) -> list[Any]:
    """Of parametrize, for (place, case). Where there is a card Triton compiles, so nothing is interpreted."""
    chosen = [pytest.param(CARD, case, id=name, marks=pytest.mark.gpu) for name, case in on_card.items()]
    if not GPU_WANTED:
        chosen += [pytest.param(INTERPRETER, case, id=f"interpreted {name}") for name, case in interpreted.items()]
    return chosen
