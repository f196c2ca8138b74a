"""What a model is."""

from gemma2_fast.spec.layers import AttentionSpec, LayerSpec, MlpSpec, NormPlacement, RecurrentSpec, RopeSpec
from gemma2_fast.spec.model import ModelSpec

__all__ = ["AttentionSpec", "LayerSpec", "MlpSpec", "ModelSpec", "NormPlacement", "RecurrentSpec", "RopeSpec"]
