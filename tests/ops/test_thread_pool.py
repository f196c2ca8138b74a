"""The thread pool and the choice of instruction sets."""

from __future__ import annotations

import threading
import time

import pytest

from gemma2_fast import _core
from gemma2_fast.errors import BackendError, Gemma2FastError


@pytest.mark.parametrize("num_threads", [1, 2, 3, 16])
def test_every_task_runs_once(num_threads: int) -> None:
    """Also with more threads than processors, and in many rounds, so that threads sleep and wake in between."""
    pool = _core.ThreadPool(num_threads)
    assert pool.num_threads == num_threads
    for num_tasks in (0, 1, 2, 3, 100, 7, 64, 1, 0, 5):
        runs: list[tuple[int, int]] = []
        pool.parallel_for(num_tasks, lambda task, thread, runs=runs: runs.append((task, thread)))
        assert sorted(task for task, _ in runs) == list(range(num_tasks))
        assert all(0 <= thread < num_threads for _, thread in runs)
        time.sleep(0.001)


def test_tasks_run_at_the_same_time() -> None:
    """Two tasks that wait for each other can only end in two threads; a third thread may take neither."""
    barrier = threading.Barrier(2, timeout=10)
    threads = set()

    def meet(_: int, thread: int) -> None:
        barrier.wait()
        threads.add(thread)

    _core.ThreadPool(3).parallel_for(2, meet)
    assert len(threads) == 2


def test_a_slow_task_does_not_hold_up_the_others() -> None:
    """Tasks are claimed one by one: while one thread is busy, the other takes all the rest."""
    others_done = threading.Semaphore(0)
    num_tasks = 50

    def run(task: int, _: int) -> None:
        if task == 0:
            for _ in range(num_tasks - 1):
                assert others_done.acquire(timeout=10)
        else:
            others_done.release()

    _core.ThreadPool(2).parallel_for(num_tasks, run)


def test_each_thread_takes_consecutive_tasks() -> None:
    """Threads that go in step never leave their halves; one that has no tasks left takes the other's last."""
    both = threading.Barrier(2, timeout=10)
    runs: dict[int, list[int]] = {0: [], 1: []}

    def run(task: int, thread: int) -> None:
        both.wait()
        runs[thread].append(task)
        both.wait()

    _core.ThreadPool(2).parallel_for(20, run)
    assert runs == {0: list(range(10)), 1: list(range(10, 20))}

    helped: list[int] = []
    done = threading.Event()

    def slow_first(task: int, thread: int) -> None:
        if task == 0:
            assert done.wait(10)
        elif task < 10:
            helped.append(task)
            if len(helped) == 9:
                done.set()

    _core.ThreadPool(2).parallel_for(20, slow_first)
    assert helped == list(range(9, 0, -1))


def test_an_exception_is_raised_after_all_tasks() -> None:
    done = []

    def run(task: int, _: int) -> None:
        if task == 3:
            raise KeyError("task 3")
        done.append(task)

    with pytest.raises(KeyError, match="task 3"):
        _core.ThreadPool(2).parallel_for(10, run)
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("num_threads", [-1, 0, 1025, 2**31 - 1])
def test_thread_counts_out_of_range(num_threads: int) -> None:
    with pytest.raises(Gemma2FastError, match=f"1 to 1024 threads, not {num_threads}"):
        _core.ThreadPool(num_threads)


def test_pools_come_and_go() -> None:
    """A pool that never worked ends as well as one whose threads sleep."""
    for rest in (0.0, 0.0, 0.002):
        pool = _core.ThreadPool(4)
        time.sleep(rest)
        del pool


def test_instruction_sets() -> None:
    names = _core.instruction_sets()
    assert names[0] == "scalar"
    assert names == [name for name in ("scalar", "avx2", "avx_vnni", "avx512_vnni", "avx512_amx") if name in names]
    assert _core.choose_instruction_set("auto") == names[-1]
    for name in names:
        assert _core.choose_instruction_set(name) == name
    assert _core.processor_name()


def test_instruction_sets_agree_with_the_operating_system() -> None:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512_vnni": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    }
    for name, needed in needs.items():
        assert (name in _core.instruction_sets()) == (needed <= set(flags))


def test_unknown_instruction_set() -> None:
    with pytest.raises(BackendError, match="unknown instruction_set"):
        _core.choose_instruction_set("neon")


@pytest.mark.skipif("avx512_vnni" in _core.instruction_sets(), reason="this machine has every set")
def test_missing_instruction_set() -> None:
    with pytest.raises(BackendError, match="this machine cannot run"):
        _core.choose_instruction_set("avx512_vnni")
