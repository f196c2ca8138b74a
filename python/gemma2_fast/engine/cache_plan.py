"""What the cache holds and how many bytes that is. The only file that counts cache bytes."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2_fast.errors import CapacityError
from gemma2_fast.spec import AttentionSpec, ModelSpec, RecurrentSpec

PAGE_TOKENS = 32  # P on a CPU, as in csrc/cpu/kernels.h: two vectors of sixteen keys
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4  # an int8 page has a float32 scale for every token's key and for its value
ROW_ELEMENTS = 32  # head_dim is filled up to a multiple


@dataclass(frozen=True)
class PagedKv:
    """Keys and values of layers with one shape and one window.

    num_blocks: pages in the pool; table_width: columns of a sequence's block table, where logical block
    b = position // P stands in column b % table_width. A windowed group is a ring: window and one chunk wide.
    """

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window_keys: int | None
    num_blocks: int
    table_width: int

    def block_bytes(self, kv_dtype: str, page_tokens: int) -> int:
        """Bytes of one page over all layers of the group."""
        padded_dim = -(-self.head_dim // ROW_ELEMENTS) * ROW_ELEMENTS
        token_bytes = 2 * (padded_dim * ELEMENT_BYTES[kv_dtype] + (SCALE_BYTES if kv_dtype == "int8" else 0))
        return len(self.layers) * self.num_kv_heads * page_tokens * token_bytes


@dataclass(frozen=True)
class RecurrentState:
    """A fixed-size state a slot: float32 recurrence [width] and the last conv_tail convolution inputs, a layer.

    The last num_snapshots of the slots are no sequence's: states are copied there and back by a batch's state_copies.
    """

    layers: tuple[int, ...]
    width: int
    conv_tail: int
    num_slots: int
    num_snapshots: int

    def slot_bytes(self) -> int:
        return len(self.layers) * self.width * (1 + self.conv_tail) * 4


@dataclass(frozen=True)
class CachePlan:
    """The groups of one model's cache for `max_sequences` sequences of up to `max_seq_len` tokens."""

    paged: tuple[PagedKv, ...]
    recurrent: RecurrentState | None
    kv_dtype: str
    page_tokens: int
    max_seq_len: int
    max_sequences: int
    max_step_tokens: int

    @property
    def num_bytes(self) -> int:
        paged = sum(group.num_blocks * group.block_bytes(self.kv_dtype, self.page_tokens) for group in self.paged)
        state = self.recurrent.num_slots * self.recurrent.slot_bytes() if self.recurrent else 0
        return paged + state


def plan_cache(
    spec: ModelSpec,
    *,
    kv_dtype: str,
    max_seq_len: int,
    max_sequences: int,
    max_step_tokens: int,
    page_tokens: int = PAGE_TOKENS,
    limit_bytes: int | None = None,
    num_snapshots: int = 0,
) -> CachePlan:
    """Size the cache so that every sequence can reach `max_seq_len`; with `limit_bytes`, cut the pools to fit.

    A cut plan holds fewer pages than all sequences could ask for, which the scheduler answers by preemption, but
    always enough for one sequence of full length. CapacityError when not even that fits.
    num_snapshots: places for states of recurrent layers beside those of the sequences.
    """
    paged: dict[tuple[int, int, int | None], list[int]] = {}
    recurrent: dict[tuple[int, int], list[int]] = {}
    for index, layer in enumerate(spec.layers):
        match layer.mixer:
            case AttentionSpec() as attention:
                key = (attention.num_kv_heads, attention.head_dim, attention.window_keys)
                paged.setdefault(key, []).append(index)
            case RecurrentSpec() as mixer:
                recurrent.setdefault((mixer.width, mixer.conv_width - 1), []).append(index)
    if len(recurrent) > 1:
        raise CapacityError(f"recurrent layers of one model must share one state shape, found {sorted(recurrent)}")

    def build(sequences: float) -> CachePlan:
        groups = []
        for (num_kv_heads, head_dim, window_keys), layers in paged.items():
            width = blocks_a_sequence(window_keys, max_seq_len, max_step_tokens, page_tokens)
            blocks = max(width, int(width * sequences))
            groups.append(PagedKv(tuple(layers), num_kv_heads, head_dim, window_keys, blocks, width))
        state = None
        for (width, conv_tail), layers in recurrent.items():
            state = RecurrentState(tuple(layers), width, conv_tail, max_sequences + num_snapshots, num_snapshots)
        return CachePlan(tuple(groups), state, kv_dtype, page_tokens, max_seq_len, max_sequences, max_step_tokens)

    plan = build(max_sequences)
    if limit_bytes is None or plan.num_bytes <= limit_bytes:
        return plan
    smallest = build(1)
    if smallest.num_bytes > limit_bytes:
        raise CapacityError(
            f"the cache of one sequence of {max_seq_len} tokens needs {smallest.num_bytes / 2**30:.2f} GiB "
            f"as {kv_dtype}, but {limit_bytes / 2**30:.2f} GiB are allowed; lower max_seq_len or raise kv_cache_gib"
        )
    if max_sequences == 1:
        return smallest
    growth_bytes = (plan.num_bytes - smallest.num_bytes) / (max_sequences - 1)
    return build(1 + (limit_bytes - smallest.num_bytes) / growth_bytes)


def blocks_a_sequence(
    window_keys: int | None, max_seq_len: int, max_step_tokens: int, page_tokens: int = PAGE_TOKENS
) -> int:
    """Pages that one sequence can hold at once: all of its tokens, or the window plus one step's chunk."""
    whole = -(-max_seq_len // page_tokens)
    if window_keys is None:
        return whole
    visible_tokens = window_keys - 1 + max_step_tokens
    return min(whole, -(-(visible_tokens - 1) // page_tokens) + 1)
