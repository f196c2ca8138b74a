"""Which pages a model's cache has, and how many bytes that is."""

from __future__ import annotations

import pytest

from gemma2_fast.engine.cache_plan import PAGE_TOKENS, blocks_a_sequence, plan_cache
from gemma2_fast.errors import CapacityError
from gemma2_fast.spec.families import spec_from_config
from tests.spec.configs import RELEASED

TWO_B = spec_from_config(RELEASED["gemma-2-2b"][0])


def test_gemma_2_2b_has_a_windowed_and_a_global_group() -> None:
    plan = plan_cache(TWO_B, kv_dtype="bfloat16", max_seq_len=8192, max_sequences=1, max_step_tokens=512)
    windowed, whole = plan.paged
    assert (windowed.window_keys, windowed.layers) == (4096, tuple(range(0, 26, 2)))
    assert (whole.window_keys, whole.layers) == (None, tuple(range(1, 26, 2)))
    assert whole.num_blocks == whole.table_width == 8192 // PAGE_TOKENS
    # Published: 832 MiB without the window; the global half of it stays.
    assert whole.num_blocks * whole.block_bytes("bfloat16", PAGE_TOKENS) == 416 * 2**20
    assert plan.num_bytes == sum(g.num_blocks * g.block_bytes("bfloat16", PAGE_TOKENS) for g in plan.paged)


def test_bytes_of_an_int8_page() -> None:
    """A token's key and value: 256 codes and a float32 scale each, in 4 heads of 13 layers, 32 tokens."""
    plan = plan_cache(TWO_B, kv_dtype="int8", max_seq_len=8192, max_sequences=1, max_step_tokens=512)
    assert plan.paged[1].block_bytes("int8", PAGE_TOKENS) == 13 * 4 * 32 * 2 * (256 + 4)


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100, 512])
@pytest.mark.parametrize("chunk", [1, 7, 32, 64])
def test_a_ring_holds_the_window_and_a_chunk_wherever_it_starts(window: int, chunk: int) -> None:
    width = blocks_a_sequence(window, 10**6, chunk)
    needed = 0
    for first in range(100 * PAGE_TOKENS, 102 * PAGE_TOKENS):
        oldest, newest = max(0, first - window + 1), first + chunk - 1
        needed = max(needed, newest // PAGE_TOKENS - oldest // PAGE_TOKENS + 1)
    assert needed <= width <= needed + 1


def test_a_ring_is_never_wider_than_the_whole_sequence() -> None:
    assert blocks_a_sequence(4096, 100, 512) == 4
    assert blocks_a_sequence(None, 100, 512) == 4


def test_recurrent_layers_have_slots_instead_of_pages() -> None:
    spec = spec_from_config(RELEASED["recurrentgemma-2b"][0])
    plan = plan_cache(spec, kv_dtype="bfloat16", max_seq_len=8192, max_sequences=3, max_step_tokens=1)
    (windowed,) = plan.paged
    assert plan.recurrent is not None
    assert (windowed.window_keys, len(windowed.layers)) == (2049, 8)
    assert (plan.recurrent.num_slots, len(plan.recurrent.layers)) == (3, 18)
    assert plan.recurrent.slot_bytes() == 18 * 2560 * 4 * 4


def test_snapshots_are_slots_and_bytes_beside_those_of_sequences() -> None:
    spec = spec_from_config(RELEASED["recurrentgemma-2b"][0])
    sizes = {"kv_dtype": "bfloat16", "max_seq_len": 8192, "max_sequences": 3, "max_step_tokens": 1}
    plain, plan = plan_cache(spec, **sizes), plan_cache(spec, **sizes, num_snapshots=5)
    assert plan.recurrent is not None
    assert (plan.recurrent.num_slots, plan.recurrent.num_snapshots) == (8, 5)
    assert plan.num_bytes - plain.num_bytes == 5 * plan.recurrent.slot_bytes()
    assert plan_cache(TWO_B, **sizes, num_snapshots=5) == plan_cache(TWO_B, **sizes)
    limit = plan.num_bytes - 1  # pages give way, snapshots do not
    cut = plan_cache(spec, **sizes, num_snapshots=5, limit_bytes=limit)
    assert cut.recurrent == plan.recurrent
    assert cut.num_bytes <= limit


def test_a_cut_plan_fits_the_limit_and_still_holds_one_whole_sequence() -> None:
    one = plan_cache(TWO_B, kv_dtype="float32", max_seq_len=8192, max_sequences=1, max_step_tokens=512).num_bytes
    limit = int(2.5 * one)
    plan = plan_cache(
        TWO_B, kv_dtype="float32", max_seq_len=8192, max_sequences=8, max_step_tokens=512, limit_bytes=limit
    )
    assert one < plan.num_bytes <= limit
    assert plan.num_bytes > 0.95 * limit
    assert all(group.num_blocks >= group.table_width for group in plan.paged)


def test_a_limit_below_one_sequence_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match=r"8192 tokens needs .* GiB .* max_seq_len"):
        plan_cache(TWO_B, kv_dtype="float32", max_seq_len=8192, max_sequences=8, max_step_tokens=512, limit_bytes=2**20)
