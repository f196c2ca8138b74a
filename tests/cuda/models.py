"""Small models on the imagined GPU: their kernels, and a step with the weights uploaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan, plan_cache
from gemma2_fast.engine.device_weights import device_format, device_parts
from gemma2_fast.engine.engine import core_cache_plan, core_spec
from gemma2_fast.spec import AttentionSpec, ModelSpec
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.triton_kernels import build
from gemma2_fast.triton_kernels.attention_decode import MOST_QUERIES, rows_for
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.weights.tensor import Tensor
from tests.cuda.fake_gpu import FakeGpu
from tests.golden import griffin_model
from tests.support.checkpoints import random_weights
from tests.support.tiny_models import TinyModel

ARCH = 90
PAGE = 16
Blocks = Mapping[str, Mapping[str, int]]
# Sizes of tiny models, in place of those that are compiled.
SMALL_BLOCKS: Blocks = {
    "attention_prefill": {"TILE": 16, "BLOCK": 16},
    "attention_decode": {"BLOCK": 16},
    "matmul": {"ROWS": 16, "COLS": 64},
    "sample_scan": {"BLOCK": 64},
    "sample_weigh": {"BLOCK": 64},
    "sample_draw": {"BLOCK": 64},
    "matmul_tiled": {"TILE_TOKENS": 16, "TILE_ROWS": 32, "COLS": 64},
    "conv1d": {"BLOCK": 64},
    "rg_lru_gates": {"BLOCK_WIDTH": 16, "TILE_TOKENS": 16, "TILE_CHANNELS": 16, "COLS": 16},
    "rg_lru_scan": {"CHANNELS": 16, "CHUNK": 8},
    "rg_lru_step": {"BLOCK_WIDTH": 16, "CHANNELS": 16, "COLS": 16},
}


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """What a step on the imagined GPU needs to know of a model; a TinyModel has the same."""

    spec: ModelSpec
    weights: Mapping[str, Tensor]


def small_recurrent_model() -> SmallModel:
    """Two recurrent layers and one of attention, whose window is eight keys."""
    sizes = {
        **{"hidden_size": 64, "lru_width": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96},
        **{"vocab_size": 512, "attention_window_size": 7, "num_hidden_layers": 3},
    }
    spec = spec_from_config({**griffin_model.config(), **sizes})
    return SmallModel(spec, random_weights(spec, "BF16"))


def small_kernels(spec: ModelSpec, blocks: Blocks = SMALL_BLOCKS) -> list[Specialisation]:
    """Every kernel that a tiny model needs: the compiled ones, with its head dims, its group and small blocks."""
    attention = {layer.mixer for layer in spec.layers if isinstance(layer.mixer, AttentionSpec)}
    found = {}
    for specialisation in build.needed(ARCH):
        for changed in _small(specialisation, attention, blocks):
            found[changed.name] = changed
    return list(found.values())


def _small(specialisation: Specialisation, attention: set[AttentionSpec], blocks: Blocks) -> Iterator[Specialisation]:
    constants = {**specialisation.constants, **blocks.get(specialisation.op, {})}
    if "PAGE" in constants:
        for mixer in attention:
            own = {"PAGE": PAGE, "HEAD_DIM": mixer.head_dim}
            if "GROUP" in constants:
                own["GROUP"] = mixer.num_query_heads // mixer.num_kv_heads
            else:
                own["PAIRS"] = mixer.rope.rotated_dims // 2
            for rows in _decode_rows(specialisation.op, own):
                yield dataclasses.replace(specialisation, constants={**constants, **own, **rows})
    else:
        yield dataclasses.replace(specialisation, constants=constants)


def _decode_rows(op: str, own: Mapping[str, int]) -> list[dict[str, int]]:
    """Of programs of decode attention: for one query a sequence, and for as many as any is compiled for."""
    if op != "attention_decode":
        return [{}]
    return [{"ROWS": rows_for(own["GROUP"], queries)} for queries in (1, MOST_QUERIES)]


def small_plan(
    spec: ModelSpec, max_seq_len: int = 64, max_sequences: int = 4, max_step_tokens: int = 16, num_snapshots: int = 0
) -> CachePlan:
    return plan_cache(
        spec, kv_dtype="bfloat16", max_seq_len=max_seq_len, max_sequences=max_sequences,
        max_step_tokens=max_step_tokens, page_tokens=PAGE, num_snapshots=num_snapshots,
    )  # fmt: skip


def gpu_step(
    gpu: FakeGpu, model: SmallModel | TinyModel, plan: CachePlan, uploads: bool = True, **changes: Any
) -> _core.GraphStep:
    """A step of the model, its cache full of NaN. uploads: whether its weights are copied up, too."""
    matrices = [name for name, tensor in model.weights.items() if len(tensor.shape) > 1]
    arguments = {
        "device": gpu.device(),
        "spec": core_spec(model.spec),
        "plan": core_cache_plan(plan),
        "formats": {name: device_format(model.weights[name]) for name in matrices},
        "kernels": gpu.images(),
        "max_step_tokens": plan.max_step_tokens,
        "max_logits_rows": plan.max_step_tokens,
        "max_sequences": plan.max_sequences,
        "max_seq_len": plan.max_seq_len,
    }
    step = _core.GraphStep(**{**arguments, **changes})
    if uploads:
        for name, tensor in model.weights.items():
            for part, data in device_parts(tensor, name in step.float32_tensors).items():
                step.upload(name, part, data)
        step.finish_upload()
    if changes.get("allocates", True):
        step.poison_cache()
    return step
