"""What must be there: every tensor of a model by canonical name, with its shape."""

from __future__ import annotations

from collections.abc import Mapping

from gemma2_fast.errors import WeightsError
from gemma2_fast.spec import AttentionSpec, ModelSpec, RecurrentSpec
from gemma2_fast.weights.tensor import Tensor

Shape = tuple[int, ...]


def manifest(spec: ModelSpec) -> dict[str, Shape]:
    """Canonical name → shape, in the order in which a forward pass uses them.

    Names say the role: `layers.{i}.norm_before_mlp`, whatever a checkpoint calls it. Matrices are (out, in).
    """
    width = spec.model_width
    shapes: dict[str, Shape] = {"embedding": (spec.vocab_size, width)}
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}."
        shapes[prefix + "norm_before_mixer"] = (width,)
        match layer.mixer:
            case AttentionSpec() as attention:
                mixer = _attention(attention, width)
            case RecurrentSpec() as recurrent:
                mixer = _recurrent(recurrent, width)
        shapes.update({prefix + name: shape for name, shape in mixer.items()})
        if layer.norms.after_mixer:
            shapes[prefix + "norm_after_mixer"] = (width,)
        shapes[prefix + "norm_before_mlp"] = (width,)
        mlp = layer.mlp.width
        for name, shape in (("gate", (mlp, width)), ("up", (mlp, width)), ("down", (width, mlp))):
            shapes[f"{prefix}mlp.{name}"] = shape
            if layer.mlp.bias:
                shapes[f"{prefix}mlp.{name}_bias"] = shape[:1]
        if layer.norms.after_mlp:
            shapes[prefix + "norm_after_mlp"] = (width,)
    shapes["final_norm"] = (width,)
    return shapes


def check_weights(spec: ModelSpec, weights: Mapping[str, Tensor], source: str) -> None:
    """WeightsError that lists every missing, unexpected and misshapen tensor at once."""
    expected = manifest(spec)
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in weights]
    problems += [f"unexpected: {name} {tensor.shape}" for name, tensor in weights.items() if name not in expected]
    problems += [
        f"misshapen: {name} is {tensor.shape}, expected {expected[name]}"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name]
    ]
    if problems:
        raise WeightsError(
            f"{source}: {len(problems)} tensors do not fit a {spec.family} of {len(spec.layers)} layers and width "
            f"{spec.model_width}; is this the configuration that belongs to these weights?\n  " + "\n  ".join(problems)
        )


def _attention(attention: AttentionSpec, width: int) -> dict[str, Shape]:
    query_width = attention.num_query_heads * attention.head_dim
    kv_width = attention.num_kv_heads * attention.head_dim
    shapes: dict[str, Shape] = {
        "attention.query": (query_width, width),
        "attention.key": (kv_width, width),
        "attention.value": (kv_width, width),
        "attention.output": (width, query_width),
    }
    if attention.output_bias:
        shapes["attention.output_bias"] = (width,)
    if attention.qk_norm:
        shapes["attention.query_norm"] = shapes["attention.key_norm"] = (attention.head_dim,)
    return shapes


def _recurrent(recurrent: RecurrentSpec, width: int) -> dict[str, Shape]:
    inner, blocks = recurrent.width, recurrent.num_gate_blocks
    block = inner // blocks
    shapes: dict[str, Shape] = {}
    for name, shape in (("linear_x", (inner, width)), ("linear_y", (inner, width)), ("linear_out", (width, inner))):
        shapes[f"recurrent.{name}"] = shape
        shapes[f"recurrent.{name}_bias"] = shape[:1]
    shapes["recurrent.conv"] = (inner, 1, recurrent.conv_width)
    shapes["recurrent.conv_bias"] = (inner,)
    shapes["recurrent.decay"] = (inner,)
    for gate in ("input_gate", "recurrence_gate"):
        shapes[f"recurrent.{gate}"] = (blocks, block, block)
        shapes[f"recurrent.{gate}_bias"] = (blocks, block)
    return shapes
