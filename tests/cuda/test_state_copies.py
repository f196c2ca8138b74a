"""States that are kept on the imagined GPU, and gone on from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma2_fast.errors import BackendError
from tests.cuda.fake_gpu import FakeGpu, teach_bfloat16
from tests.cuda.models import PAGE, SmallModel, gpu_step, small_kernels, small_plan, small_recurrent_model
from tests.support.planned_steps import Floats, Planner, run_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of the gate of a large negative number
]

SEQUENCES = 4
SNAPSHOT = SEQUENCES  # its slot


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    teach_bfloat16(monkeypatch)


@pytest.fixture(scope="module")
def model() -> SmallModel:
    return small_recurrent_model()


def planner_of(gpu: FakeGpu, model: SmallModel) -> Planner:
    plan = small_plan(model.spec, max_sequences=SEQUENCES, num_snapshots=1)
    return Planner(run_of(gpu_step(gpu, model, plan), model.spec.vocab_size), plan)


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 500, length).tolist()


def straight(planner: Planner, prompt: list[int], rest: list[int], chunk: int) -> Floats:
    sequence = planner.begin(slot=0)
    planner.feed(sequence, prompt, PAGE)
    return planner.feed(sequence, rest, chunk)


@pytest.mark.parametrize(("length", "chunk"), [(2, 2), (PAGE - 1, 1), (PAGE, 2)])
def test_going_on_from_a_snapshot(model: SmallModel, driver_library: Path, length: int, chunk: int) -> None:
    """Twice, to different slots: in decode steps the second one replays the graph that the first one captured.

    Prompts shorter than the convolution reaches back, past the window of eight keys, and with a page at the end.
    """
    gpu = FakeGpu(driver_library, small_kernels(model.spec))
    prompt, rest = ids(length, seed=length), ids(2, seed=1)
    expected = straight(planner_of(gpu, model), prompt, rest, chunk)
    planner = planner_of(gpu, model)
    stem, other = planner.begin(slot=0), planner.begin(slot=0)
    planner.feed(stem, prompt, PAGE)
    planner.step((other, ids(2, seed=2)), copies=[(0, SNAPSHOT)])
    for slot in (2, 0):
        found = planner.feed(planner.branch(stem, slot), rest, chunk, copies=[(SNAPSHOT, slot)])
        assert np.array_equal(found, expected)


def test_a_copy_that_fails(model: SmallModel, driver_library: Path) -> None:
    """Ends the step, which is over before the next one."""
    gpu = FakeGpu(driver_library, small_kernels(model.spec), computes=False)
    planner = planner_of(gpu, model)
    sequence = planner.begin(slot=0)
    planner.step((sequence, [5]))
    gpu.fail("cuMemcpyDtoDAsync", 3, 700)
    with pytest.raises(BackendError, match="CUDA_ERROR_ILLEGAL_ADDRESS while copying 512 bytes on the device"):
        planner.step((sequence, [6]), copies=[(0, SNAPSHOT)])
    assert gpu.calls()[-2:] == ["cuStreamSynchronize", "cuCtxPopCurrent"]
