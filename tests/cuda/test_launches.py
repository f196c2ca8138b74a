"""What the GPU's step launches, copies and refuses. Nothing is computed here: launches are only written down."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2_fast import _core
from gemma2_fast.errors import BackendError, CapacityError, Gemma2FastError
from gemma2_fast.reference import flat_batch
from tests.cuda.fake_gpu import FakeGpu, Launch
from tests.cuda.loop import Loop
from tests.cuda.models import gpu_step, small_kernels, small_plan
from tests.support.tiny_models import TinyModel, tiny_model

LAYERS = 2
ILLEGAL_ADDRESS = 700


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(
        "gemma2", tmp_path_factory.mktemp("model"), dtype="bfloat16", head_dim=16, num_hidden_layers=LAYERS
    )


@pytest.fixture
def gpu(model: TinyModel, driver_library: Path) -> FakeGpu:
    return FakeGpu(driver_library, small_kernels(model.spec), computes=False)


def launches_of_a_step(gpu: FakeGpu, model: TinyModel, prompts: list[int], **sizes: int) -> list[Launch]:
    """Prompts of these lengths, one after another; gives the launches of the last step that ran."""
    plan = small_plan(model.spec, **sizes)
    with Loop(gpu_step(gpu, model, plan), model, plan) as loop:
        for length in prompts:
            gpu.launches.clear()
            loop.events(loop.submit([2] * length, max_tokens=1))
    return list(gpu.launches)


def ops(launches: list[Launch], gpu: FakeGpu) -> list[str]:
    return [gpu.specialisations[launch.symbol].op for launch in launches]


def test_a_decode_step_is_eight_kernels_a_layer(gpu: FakeGpu, model: TinyModel) -> None:
    """Around them: the embedding, the first norm, the head and the three steps of the choice."""
    layer = ["matmul", "rope", "attention_decode", "matmul", "rms_norm_add", "matmul", "matmul", "rms_norm_add"]
    around = (["embed", "rms_norm"], ["matmul", "sample_scan", "sample_weigh", "sample_draw"])
    assert ops(launches_of_a_step(gpu, model, [1]), gpu) == [*around[0], *LAYERS * layer, *around[1]]


def test_sizes_of_launches(gpu: FakeGpu, model: TinyModel) -> None:
    """One token: E 48, H 6, K 2, D 16, F 80, V 512; blocks of 16 rows, and four processors."""
    by_op: dict[str, list[Launch]] = {}
    for launch in launches_of_a_step(gpu, model, [1]):
        by_op.setdefault(gpu.specialisations[launch.symbol].op, []).append(launch)
    qkv, output, gated, down, *_, head = by_op["matmul"]
    assert [launch.grid[0] for launch in (qkv, output, gated, down, head)] == [10, 3, 5, 3, 32]
    assert [qkv.arguments[name] for name in ("rows", "cols", "num_tokens")] == [160, 48, 1]
    assert [gated.arguments[name] for name in ("rows", "cols")] == [80, 48]
    windowed, whole = by_op["attention_decode"]
    assert windowed.grid == (1, 2, 1)  # nine keys are one block
    assert whole.grid == (4, 2, 1)  # two programs a processor, two kv heads
    assert (windowed.arguments["window"], whole.arguments["window"]) == (9, 0)
    assert windowed.arguments["cap"] == 4.0
    assert windowed.arguments["query_stride"] == 160
    assert windowed.arguments["pages"] != whole.arguments["pages"]
    assert all(launch.threads == 128 for launch in by_op["attention_decode"])


def test_parameters_lie_in_the_kernels_order(gpu: FakeGpu, model: TinyModel) -> None:
    """Names are those of the kernel; hidden pointers are null."""
    (launch, *_) = [launch for launch in launches_of_a_step(gpu, model, [1]) if launch.symbol.startswith("rms_norm_")]
    assert list(launch.arguments) == [
        name for name, kind in gpu.specialisations[launch.symbol].signature().items() if kind != "constexpr"
    ]
    assert launch.hidden == (0, 0)


def test_prefill_attends_in_tiles_of_ragged_sequences(gpu: FakeGpu, model: TinyModel) -> None:
    """Tiles of sixteen rows hold five queries of three heads: eleven tokens take three."""
    prefills = [x for x in launches_of_a_step(gpu, model, [11]) if x.symbol.startswith("attention_prefill")]
    assert [launch.grid for launch in prefills] == [(3, 2, 1)] * LAYERS


def attention(launches: list[Launch], gpu: FakeGpu) -> list[Launch]:
    return [launch for launch in launches if gpu.specialisations[launch.symbol].op.startswith("attention_")]


def test_a_new_prompt_has_no_keys_to_split(gpu: FakeGpu, model: TinyModel) -> None:
    found = attention(launches_of_a_step(gpu, model, [2]), gpu)
    assert ops(found, gpu) == LAYERS * ["attention_prefill"]


@pytest.mark.parametrize(("tail", "rows"), [(5, 16), (6, 32), (10, 32), (11, None)])
def test_the_last_few_tokens_of_a_prompt_split_its_keys(
    gpu: FakeGpu, model: TinyModel, tail: int, rows: int | None
) -> None:
    """Three heads a query: programs of sixteen rows have room for five queries, those of 32 for ten."""
    found = attention(launches_of_a_step(gpu, model, [32 + tail], max_step_tokens=32), gpu)[-LAYERS:]
    assert ops(found, gpu) == LAYERS * ["attention_prefill" if rows is None else "attention_decode"]
    if rows is None:
        return
    for launch in found:
        assert gpu.specialisations[launch.symbol].constants["ROWS"] == rows
        splits, kv_heads, sequences = launch.grid
        parts, part_sums, arrivals = (int(launch.arguments[name]) for name in ("parts", "part_sums", "arrivals"))
        programs = splits * kv_heads * sequences
        assert parts + 4 * programs * rows * 16 <= part_sums
        assert part_sums + 4 * programs * 2 * rows <= arrivals


def test_the_layer_with_the_least_room_decides(gpu: FakeGpu, model: TinyModel) -> None:
    """Six queries are too many for one of the two, so both take tiles."""
    narrow = [
        gpu.image(s)
        for s in gpu.specialisations.values()
        if s.op != "attention_decode" or s.constants["ROWS"] == 16 or not s.constants["WINDOWED"]
    ]
    plan = small_plan(model.spec, max_step_tokens=32)
    with Loop(gpu_step(gpu, model, plan, kernels=narrow), model, plan) as loop:
        loop.events(loop.submit([2] * (32 + 6), max_tokens=1))
    assert ops(attention(gpu.launches, gpu)[-LAYERS:], gpu) == LAYERS * ["attention_prefill"]


def test_a_split_has_as_many_keys_as_its_part_has_rows(driver_library: Path, tmp_path: Path) -> None:
    """48 keys: three blocks of sixteen, each a split of a token's; seven tokens are 21 of 32 rows."""
    model = tiny_model("gemma2", tmp_path, head_dim=16, num_hidden_layers=1, sliding_window=48)
    for tail, splits in ((1, 3), (7, 2)):
        gpu = FakeGpu(driver_library, small_kernels(model.spec), computes=False)
        (launch,) = attention(launches_of_a_step(gpu, model, [32 + tail], max_step_tokens=32), gpu)[1:]
        assert launch.grid == (splits, 2, 1)


def test_shared_memory_beyond_the_usual_is_asked_for(gpu: FakeGpu, model: TinyModel) -> None:
    plan = small_plan(model.spec)
    gpu_step(gpu, model, plan, kernels=gpu.images(dynamic_shared_bytes=48 * 1024 - 1024))
    assert not any(call.startswith("cuFuncSetAttribute") for call in gpu.calls())
    gpu_step(gpu, model, plan, kernels=gpu.images(dynamic_shared_bytes=100_000))
    assert "cuFuncSetAttribute 100000" in gpu.calls()


def test_dependent_launches(gpu: FakeGpu, model: TinyModel) -> None:
    plan = small_plan(model.spec)
    with Loop(gpu_step(gpu, model, plan, kernels=gpu.images(dependent_launch=True)), model, plan) as loop:
        loop.events(loop.submit([2], max_tokens=1))
    assert gpu.launches
    assert all(launch.dependent for launch in gpu.launches)


FAILURES = (
    ("cuCtxPushCurrent", 0, "choosing Imagined GPU"),
    ("cuStreamBeginCapture", 0, "beginning a capture"),
    ("cuLaunchKernelEx", 3, "launching rope_"),
    ("cuStreamEndCapture", 0, "ending a capture"),
    ("cuGraphInstantiate", 0, "making a graph of a step"),
    ("cuGraphLaunch", 0, "launching a graph"),
    ("cuEventRecord", 0, "recording an event"),
    ("cuEventSynchronize", 0, "waiting for the device"),
    ("cuStreamSynchronize", 0, "waiting for the device"),
)


def test_a_failed_call_ends_its_step_and_no_other(gpu: FakeGpu, model: TinyModel) -> None:
    """A launch that fails while it is captured ends the capture, too."""
    plan = small_plan(model.spec)
    with Loop(gpu_step(gpu, model, plan), model, plan) as loop:
        for function, after, doing in FAILURES:
            gpu.fail(function, after, ILLEGAL_ADDRESS)
            message = loop.events(loop.submit([2], max_tokens=3))[-1].message
            assert f"CUDA_ERROR_ILLEGAL_ADDRESS while {doing}" in str(message)
            gpu.fail(function, 10**6, 0)
        message = loop.events(loop.submit([2], max_tokens=1))[-1].message
        assert "NaN" in str(message)  # it ran, and nothing was computed


def test_a_failed_step_is_over_before_the_next_one(gpu: FakeGpu, model: TinyModel) -> None:
    """What it had queued may still read the inputs that the next one overwrites."""
    plan = small_plan(model.spec)
    with Loop(gpu_step(gpu, model, plan, captures=False), model, plan) as loop:
        gpu.fail("cuLaunchKernelEx", 3, ILLEGAL_ADDRESS)
        loop.events(loop.submit([2], max_tokens=1))
        assert gpu.calls()[-2:] == ["cuStreamSynchronize", "cuCtxPopCurrent"]


@pytest.mark.parametrize(
    ("function", "doing"),
    [
        ("cuMemAlloc", "bytes of device memory for weights, cache and activations"),
        ("cuMemHostAlloc", "bytes of host memory for the inputs of a step"),
    ],
)
def test_memory_runs_out(gpu: FakeGpu, model: TinyModel, function: str, doing: str) -> None:
    gpu.fail(function, 0, 2)
    with pytest.raises(CapacityError, match=rf"CUDA_ERROR_OUT_OF_MEMORY while .* {doing}; lower max_seq_len"):
        gpu_step(gpu, model, small_plan(model.spec))


RENAMED = [("qkv", "*bf16", False), ("angle", "fp32", False)]
UNLIKE = {
    "an unknown parameter": ("rope", {"parameters": RENAMED}, "rope.*: no argument angle"),
    "another type": ("embed", {"parameters": [("scale", "i32", False)]}, "embed.*: scale must be i32"),
    "a promise": (
        "rope",
        {"parameters": [("table_width", "i32", True)]},
        "table_width must be a multiple of 16, got 3",
    ),
    "an alignment": ("rope", {"pointer_alignment_bytes": 2**40}, "qkv must be aligned to 1099511627776 bytes"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_kernel_whose_arguments_are_not_those_of_the_step(gpu: FakeGpu, model: TinyModel, name: str) -> None:
    op, changes, message = UNLIKE[name]
    images = [gpu.image(s, **(changes if s.op == op else {})) for s in gpu.specialisations.values()]
    plan = small_plan(model.spec)
    with Loop(gpu_step(gpu, model, plan, kernels=images), model, plan) as loop:
        found = loop.events(loop.submit([2], max_tokens=1))[-1].message
    assert found is not None
    assert re.search(message, found)


def test_kernels_that_are_missing_or_broken(gpu: FakeGpu, model: TinyModel) -> None:
    plan = small_plan(model.spec)
    without = [
        gpu.image(s) for s in gpu.specialisations.values() if s.op != "attention_decode" or not s.constants["CAPPED"]
    ]
    with pytest.raises(
        BackendError, match=r"no kernel attention_decode is compiled for CAPPED=1, GROUP=3.* sm_90; there is\n"
    ):
        gpu_step(gpu, model, plan, kernels=without)
    with pytest.raises(BackendError, match="no kernel embed .* there is none of that op"):
        gpu_step(gpu, model, plan, kernels=[gpu.image(s) for s in gpu.specialisations.values() if s.op != "embed"])
    with pytest.raises(BackendError, match="driver of Imagined GPU cannot load the kernel .*: update NVIDIA's driver"):
        gpu_step(gpu, model, plan, kernels=gpu.images(code=b"broken"))


def raw_step(gpu: FakeGpu, model: TinyModel, **changes: Any) -> _core.GraphStep:
    return gpu_step(gpu, model, small_plan(model.spec), uploads=False, **changes)


def test_uploads_that_do_not_fit(gpu: FakeGpu, model: TinyModel) -> None:
    step, gain = raw_step(gpu, model), np.zeros(4 * 48, np.uint8)
    for name, part, data, message in (
        ("final_gnome", "weight", gain, "the model has no tensor final_gnome"),
        ("final_norm", "scales", gain, "final_norm has no scales in its format"),
        ("final_norm", "weight", gain[1:], "weight of final_norm has 191 bytes, expected 192"),
    ):
        with pytest.raises(Gemma2FastError, match=message):
            step.upload(name, part, data)
    step.upload("final_norm", "weight", gain)
    with pytest.raises(Gemma2FastError, match=r"not uploaded: embedding \(weight\), layers.0.attention.key \(weight\)"):
        step.finish_upload()
    with Loop(step, model, small_plan(model.spec)) as loop:
        assert "the upload is not finished" in str(loop.events(loop.submit([2], max_tokens=1))[-1].message)


def test_weights_that_no_kernel_reads(gpu: FakeGpu, model: TinyModel) -> None:
    formats = {name: "bfloat16" for name, tensor in model.weights.items() if len(tensor.shape) > 1}
    for change, message in (
        (
            {"layers.0.attention.key": "int8"},
            "layers.0.attention.key and layers.0.attention.query must have one format",
        ),
        ({"embedding": "float16"}, "weights as 'float16' have no GPU kernels"),
    ):
        with pytest.raises(BackendError, match=message):
            raw_step(gpu, model, formats={**formats, **change})
    del formats["layers.1.mlp.down"]
    with pytest.raises(Gemma2FastError, match="layers.1.mlp.down is missing"):
        raw_step(gpu, model, formats=formats)


def test_large_tensors_go_up_in_pieces(gpu: FakeGpu, model: TinyModel) -> None:
    """Two pinned buffers of 16 MiB, whatever the tensor; each is waited for before it is filled again."""
    wide = tiny_model("gemma2", model.directory.parent / "wide", dtype="bfloat16", head_dim=16, num_hidden_layers=1,
                      hidden_size=1152, vocab_size=16384)  # fmt: skip
    gpu_step(gpu, wide, small_plan(wide.spec))
    calls = gpu.calls()
    assert calls.count(f"cuMemHostAlloc {16 * 2**20}") == 2
    assert calls.count(f"cuMemcpyHtoDAsync {16 * 2**20}") == 2
    assert calls.count("cuEventSynchronize") == calls.count("cuEventRecord") > 2


def test_a_cap_that_no_kernel_computes(gpu: FakeGpu, tmp_path: Path) -> None:
    """Weights have no running maximum under a cap, so a wide one would overflow."""
    wide = tiny_model("gemma2", tmp_path, head_dim=16, num_hidden_layers=1, attn_logit_softcapping=60.0)
    with pytest.raises(BackendError, match=r"layers.0.attention.score_softcap 60.* up to 55.*use backend=\"cpu\""):
        gpu_step(gpu, wide, small_plan(wide.spec))


def test_more_shared_memory_than_there_is(gpu: FakeGpu, model: TinyModel) -> None:
    with pytest.raises(BackendError, match="takes 233024 bytes of shared memory, Imagined GPU has 232448"):
        gpu_step(gpu, model, small_plan(model.spec), kernels=gpu.images(dynamic_shared_bytes=232000))


def test_steps_that_were_not_planned(gpu: FakeGpu, model: TinyModel) -> None:
    """The loop's limits are wider than the step's: an error for the request, not a write outside of tables."""
    plan = small_plan(model.spec)
    for narrow, message in (({"max_seq_len": 8}, "up to position 9"), ({"max_step_tokens": 4}, "step of 10 tokens")):
        with Loop(gpu_step(gpu, model, plan, **narrow), model, plan) as loop:
            assert message in str(loop.events(loop.submit([2] * 10, max_tokens=1))[-1].message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_slot": [0]}, "state slots, the model no recurrent layer"),
        ({"token_ids": [-3]}, "that of row 2 of the step before, which has 0"),
        ({"token_ids": [10**6]}, "outside the vocabulary"),
    ],
    ids=str,
)
def test_batches_that_no_scheduler_makes(
    gpu: FakeGpu, model: TinyModel, change: dict[str, list[int]], message: str
) -> None:
    plan = small_plan(model.spec)
    tables = tuple(np.zeros((1, group.table_width), np.int32) for group in plan.paged)
    batch = flat_batch([[5]], [0], block_table=tables)
    step = gpu_step(gpu, model, plan)
    step.run(batch, model.spec.vocab_size)
    wrong = dataclasses.replace(batch, **{name: np.array(values, np.int32) for name, values in change.items()})
    with pytest.raises(Gemma2FastError, match=message):
        step.run(wrong, model.spec.vocab_size)
