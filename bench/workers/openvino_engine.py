"""OpenVINO's CPU plugin on a model that optimum-cli exported, its head cut to the last position of a step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13


class OpenVino:
    """An export's directory. settings: model, threads, options (properties of the plugin)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.versions = {"openvino": openvino.__version__}
        core = openvino.Core()
        model = core.read_model(Path(settings["model"]) / "openvino_model.xml")
        _keep_last_position(model)
        properties = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(settings["threads"]),
            **settings["options"],
        }
        self._request = core.compile_model(model, "CPU", properties).create_infer_request()
        self._inputs = {name for tensor in model.inputs for name in tensor.get_names()}
        self._rng = np.random.default_rng(0)

    def prefill(self, tokens: int) -> float:
        self._request.reset_state()
        return self._step(self._random(1, tokens), 0)

    def decode(self, batch: int, context: int, steps: int) -> float:
        self._request.reset_state()
        self._step(self._random(batch, context), 0)
        return sum(self._step(self._random(batch, 1), context + step) for step in range(steps))

    def likeliest(self, ids: list[int]) -> list[tuple[int, float]]:
        self._request.reset_state()
        self._step(np.array([ids]), 0)
        logits = self._request.get_output_tensor(0).data[0, -1]
        return [(int(token_id), float(logits[token_id])) for token_id in np.argsort(-logits)[:5]]

    def _random(self, batch: int, tokens: int) -> NDArray[np.int64]:
        return self._rng.integers(300, 200_000, (batch, tokens))

    def _step(self, ids: NDArray[np.int64], past: int) -> float:
        batch, tokens = ids.shape
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, past + tokens), np.int64),
            "position_ids": np.tile(np.arange(past, past + tokens, dtype=np.int64), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        feed = {name: value for name, value in feed.items() if name in self._inputs}
        start = time.perf_counter()
        self._request.infer(feed, share_inputs=True, share_outputs=True)
        return time.perf_counter() - start


def _keep_last_position(model: Any) -> None:
    """Cuts the input of the last matrix product, the head, to its last position."""
    node = model.get_results()[0].input_value(0).get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    first, end, step, axis = (opset13.constant(np.array([n], np.int64)) for n in (-1, 2**31 - 1, 1, 1))
    last = opset13.slice(node.input_value(0), first, end, step, axis)
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def load(settings: dict[str, Any]) -> OpenVino:
    return OpenVino(settings)
