"""A checkpoint as a CTranslate2 int8 model: python make_ctranslate2.py CHECKPOINT OUT

Needs ctranslate2, torch, transformers 4.57, and about 10 GiB of memory for the 2B. The pieces are called t4, t5 … .
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from ctranslate2.converters import transformers as loaders
from ctranslate2.converters.converter import Converter
from transformers import Gemma2ForCausalLM

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]


class Markers:
    """What the loader asks a tokenizer for."""

    bos_token, eos_token, unk_token = "<bos>", "<eos>", "<unk>"


class WithoutTokenizer(Converter):  # type: ignore[misc]
    """Converts a checkpoint that has no tokenizer."""

    def __init__(self, checkpoint: str) -> None:
        self._checkpoint = checkpoint

    def _load(self) -> Any:
        loader = loaders._MODEL_LOADERS["Gemma2Config"]
        with torch.no_grad():
            model = Gemma2ForCausalLM.from_pretrained(self._checkpoint, torch_dtype=torch.float16)
            spec = loader.get_model_spec(model)
            loader.set_config(spec.config, model, Markers())
            pieces = CONTROL + [f"t{i}" for i in range(len(CONTROL), model.config.vocab_size)]
            loader.set_vocabulary(spec, pieces)
        return spec


if __name__ == "__main__":
    WithoutTokenizer(sys.argv[1]).convert(sys.argv[2], quantization="int8")
