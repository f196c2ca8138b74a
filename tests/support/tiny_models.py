"""Small random models of every family, written by transformers, that can tell a wrong implementation from a right one.

Naively drawn Gemma weights echo one id for ever and hardly feel their window. Here the embedding is small beside what
the layers add, the final norm is large, scores reach the cap, and the window is a few keys wide; the numbers below are
checked by the tests of the reference (distinct ids, every mutant far beyond the tolerance).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
)
from transformers.utils import logging as transformers_logging

from gemma2_fast.spec import AttentionSpec, ModelSpec, RopeSpec
from gemma2_fast.weights.load import load_checkpoint
from gemma2_fast.weights.tensor import Tensor

transformers_logging.disable_progress_bar()

FAMILIES = ("gemma", "gemma2", "gemma3_text", "recurrent_gemma")
WINDOW_KEYS = 9
TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

_SHARED = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "attn_implementation": "eager",
}
_FAMILY = {
    "gemma": (GemmaConfig, {"num_hidden_layers": 6, "num_key_value_heads": 3, "head_dim": 10}),
    "gemma2": (
        Gemma2Config,
        {
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "query_pre_attn_scalar": 7,
            "sliding_window": WINDOW_KEYS,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 11.0,
        },
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        {
            "num_hidden_layers": 8,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "query_pre_attn_scalar": 17,
            "sliding_window": WINDOW_KEYS,
        },
    ),
    "recurrent_gemma": (
        RecurrentGemmaConfig,
        {
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "intermediate_size": 160,
            "attention_window_size": WINDOW_KEYS,
            "logits_soft_cap": 11.0,
        },
    ),
}
_VARIED_SEED = {"gemma": 6, "gemma2": 0, "gemma3_text": 3, "recurrent_gemma": 7}


@dataclass(frozen=True)
class TinyModel:
    """A checkpoint directory (config.json, model.safetensors) and the transformers model it was saved from.

    config: what config.json holds. weights: canonical name → tensor, as stored.
    """

    directory: Path
    config: Mapping[str, Any]
    hf_model: PreTrainedModel
    spec: ModelSpec
    weights: Mapping[str, Tensor]

    def oracle(self, dtype: torch.dtype) -> PreTrainedModel:
        """The transformers model of the stored weights, computing in `dtype`."""
        return _hf_model(self.hf_model.config, dtype, self.hf_model.state_dict())


def tiny_model(
    family: str, directory: Path, *, dtype: str = "float32", seed: int | None = None, **config: Any
) -> TinyModel:
    """Write a model of `family`, one of FAMILIES, into `directory`, its tensors stored as `dtype`.

    seed: None for the family's own, whose greedy output is known to vary. Further keywords replace values of the
    configuration.
    """
    config_class, values = _FAMILY[family]
    hf_config = config_class(**{**_SHARED, **values, **config})
    hf_model = _hf_model(hf_config, torch.float32, {})
    draw_weights(hf_model, _VARIED_SEED[family] if seed is None else seed)
    hf_model = hf_model if dtype == "float32" else _hf_model(hf_config, TORCH_DTYPES[dtype], hf_model.state_dict())
    hf_model.save_pretrained(directory)
    stated = json.loads((directory / "config.json").read_text())
    if "attention_window_size" in stated:
        # DeepMind's code sees the query besides so many keys, transformers counts it among them: so the file must ask
        # for one key less to mean the same (test_recurrent_gemma.py).
        stated["attention_window_size"] -= 1
        (directory / "config.json").write_text(json.dumps(stated))
    checkpoint = load_checkpoint(directory)
    return TinyModel(directory, stated, hf_model, checkpoint.spec, checkpoint.weights)


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Replace every parameter by a draw that depends on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            mean, deviation = _distribution(name, parameter.shape)
            parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))


def _distribution(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's draw."""
    if name.endswith("embed_tokens.weight"):
        # Scaled by the root of the width later, it would echo in a wider model.
        return 0.0, 0.05 * min(1.0, (_SHARED["hidden_size"] / shape[1]) ** 0.5)
    if name.endswith(("model.norm.weight", "final_norm.weight")):
        return 14.0, 2.0
    if name.endswith(("norm.weight", "bias")):
        return 0.0, 0.3
    if name.endswith("recurrent_param"):
        return -4.5, 1.0  # exp(-softplus) from 0.9 to 0.999: states that last
    if name.endswith("conv_1d.weight"):
        return 0.0, 0.5
    # Queries and keys: scores that reach the cap. Gate: values around 2, where the two GELUs differ most.
    gain = {"q_proj": 1.1, "k_proj": 1.1, "gate_proj": 1.6}.get(name.split(".")[-2], 1.0)
    return 0.0, gain * shape[1] ** -0.5


def _hf_model(config: Any, dtype: torch.dtype, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    # Built in its dtype and not cast to it: casting would round the float32 RoPE frequencies and the embedding scale.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    if state:
        model.load_state_dict(state)
    return model.eval()


class _WideFloat64(TorchFunctionMode):
    """Keeps float64 tensors float64 where transformers asks for float32: in RMSNorm, softmax and recurrence."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func is torch.Tensor.type and args[0].dtype == torch.float64 and args[1:] == (torch.float32,):
            return args[0]
        if func is torch.nn.functional.softmax and args[0].dtype == torch.float64:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def exact_arithmetic(tiny: TinyModel, model: PreTrainedModel) -> Iterator[None]:
    """Lets a float64 oracle be compared to the last digits.

    It computes RMSNorm, softmax and recurrent states in float64, which transformers would do in float32, and turns with
    our float32 RoPE frequencies, which differ from torch.pow's by a few roundings (a test bounds them).
    """
    for buffer, rope in frequency_buffers(tiny, model):
        buffer.copy_(torch.tensor(rope.inverse_frequencies()))
    with torch.no_grad(), _WideFloat64():
        yield


def frequency_buffers(tiny: TinyModel, model: PreTrainedModel) -> list[tuple[torch.Tensor, RopeSpec]]:
    """The oracle's buffer of inverse frequencies for every RoPE of the model."""
    if tiny.spec.family == "recurrent_gemma":
        blocks = [layer.temporal_block for layer in model.model.layers]
        return [
            (block.rotary_emb.inv_freq, layer.mixer.rope)
            for block, layer in zip(blocks, tiny.spec.layers, strict=True)
            if isinstance(layer.mixer, AttentionSpec)
        ]
    rotary = model.model.rotary_emb
    pairs = []
    mixers = {layer.mixer for layer in tiny.spec.layers if isinstance(layer.mixer, AttentionSpec)}
    for mixer in mixers:
        kind = "full_attention" if mixer.window_keys is None else "sliding_attention"
        own = getattr(rotary, f"{kind}_inv_freq", None)
        pairs.append((rotary.inv_freq if own is None else own, mixer.rope))
    return pairs
