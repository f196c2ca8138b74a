"""The C++ engine: cache, scheduler, sampler, decode loop and CPU kernels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.engine import step_batch

class PagedKvGroup:
    def __init__(
        self,
        *,
        layers: Sequence[int],
        num_kv_heads: int,
        head_dim: int,
        window_keys: int | None,
        num_blocks: int,
        table_width: int,
    ) -> None: ...
    @property
    def layers(self) -> list[int]: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def window_keys(self) -> int | None: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def table_width(self) -> int: ...

class RecurrentStateGroup:
    def __init__(
        self, *, layers: Sequence[int], width: int, conv_tail: int, num_slots: int, num_snapshots: int = 0
    ) -> None: ...
    @property
    def layers(self) -> list[int]: ...
    @property
    def width(self) -> int: ...
    @property
    def conv_tail(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def num_snapshots(self) -> int: ...

class CachePlan:
    def __init__(
        self, *, page_tokens: int, paged: Sequence[PagedKvGroup], recurrent: RecurrentStateGroup | None = None
    ) -> None: ...
    @property
    def page_tokens(self) -> int: ...
    @property
    def paged(self) -> list[PagedKvGroup]: ...
    @property
    def recurrent(self) -> RecurrentStateGroup | None: ...

class Limits:
    def __init__(
        self,
        *,
        max_running_sequences: int,
        max_step_tokens: int,
        max_seq_len: int,
        max_logits_rows: int,
        vocab_size: int,
        final_softcap: float | None = None,
    ) -> None: ...
    @property
    def max_running_sequences(self) -> int: ...
    @property
    def max_step_tokens(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def max_logits_rows(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def final_softcap(self) -> float | None: ...

class SamplingParams:
    """How the next token is chosen; the defaults change nothing, and temperature 0 is greedy. Checked by submit."""

    def __init__(
        self,
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Sequence[tuple[int, float]] = (),
        seed: int = 0,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> None: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def seed(self) -> int: ...

class Request:
    """One prompt. With max_tokens 0 it only evaluates the prompt and ends with "length".

    num_logprobs, num_prompt_logprobs: how many alternatives stand beside each token's logprob; None: no logprobs.
    logits_out: float32 [T, V], receives the capped logits of every prompt token.
    """

    def __init__(
        self,
        *,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        num_logprobs: int | None = None,
        num_prompt_logprobs: int | None = None,
        logits_out: NDArray[np.float32] | None = None,
    ) -> None: ...

class TokenLogprob:
    """Natural log of a token's probability under the raw logits, with the likeliest tokens, likeliest first."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> list[tuple[int, float]]: ...

class TokenEvent:
    """What one step told about one sequence; the event with a finish_reason is the last.

    With "stop", token_id is the stop token itself; with "cancelled" and "error" there is no token but a message.
    prompt_logprobs: the next rows, from the prompt's second token on. time_ns: the clock of time.monotonic_ns.
    """

    @property
    def sequence_id(self) -> int: ...
    @property
    def token_id(self) -> int | None: ...
    @property
    def logprob(self) -> TokenLogprob | None: ...
    @property
    def prompt_logprobs(self) -> list[TokenLogprob]: ...
    @property
    def finish_reason(self) -> Literal["stop", "length", "cancelled", "error"] | None: ...
    @property
    def message(self) -> str | None: ...
    @property
    def time_ns(self) -> int: ...

class StepBatch:
    """One step's work: read-only arrays with the meaning of engine.step_batch.StepBatch."""

    @property
    def token_ids(self) -> step_batch.Ints: ...
    @property
    def positions(self) -> step_batch.Ints: ...
    @property
    def first_token(self) -> step_batch.Ints: ...
    @property
    def context_tokens(self) -> step_batch.Ints: ...
    @property
    def block_table(self) -> tuple[step_batch.Ints, ...]: ...
    @property
    def state_slot(self) -> step_batch.Ints: ...
    @property
    def state_copies(self) -> step_batch.Ints: ...
    @property
    def logits_token(self) -> step_batch.Ints: ...

class ModelStep:
    """What a backend is to the decode loop."""

    def run(self, batch: step_batch.StepBatch, vocab_size: int) -> NDArray[np.float32]:
        """One step by hand, for tests: the logits [L, V] before the final soft cap. No loop may have this step."""

class CallbackStep(ModelStep):
    """Runs a Python callable as a model step. What it gets is this module's StepBatch, equal in fields.

    choose: from logits [L, V] and each row's parameters and index of the token to generate, the tokens [L], -1 where
    the sampler has to; steps then run one ahead of what is known of their tokens.
    """

    def __init__(
        self,
        callable: Callable[[step_batch.StepBatch], NDArray[np.float32]],
        choose: Callable[[NDArray[np.float32], list[tuple[SamplingParams, int]]], Sequence[int]] | None = None,
    ) -> None: ...

class DecodeLoop:
    """Schedules, runs and samples steps on a thread of its own. Any thread may call any method."""

    def __init__(self, step: ModelStep, plan: CachePlan, limits: Limits) -> None: ...
    def submit(self, request: Request) -> int:
        """The sequence's id. RequestError: never servable; CapacityError: never fits; BackendError: closed."""

    def cancel(self, sequence_id: int) -> None:
        """End the sequence before the next step; its last event says "cancelled"."""

    def forget(self, sequence_id: int) -> None:
        """Cancel, and throw away what nobody will collect."""

    def wait(self, sequence_id: int, timeout_s: float | None = None) -> list[TokenEvent]:
        """The sequence's new events, oldest first, as soon as there are any; empty if none came in time.

        RequestError once the last event has been collected. Ctrl-C interrupts it.
        """

    def stats(self) -> dict[str, Any]:
        """num_running, num_waiting, num_steps, num_preemptions, num_prefill_tokens, num_decode_tokens, last_step_age_s
        (None before the first), and groups: num_blocks, num_free and peak_held (by any one sequence) of each.
        """

    def close(self) -> None:
        """End every sequence with "cancelled" and stop the thread; events can still be collected."""

class AttentionSpec:
    def __init__(
        self,
        *,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        query_scale: float,
        score_softcap: float | None,
        window_keys: int | None,
        qk_norm: bool,
        output_bias: bool,
        inverse_frequencies: Sequence[float],
    ) -> None: ...

class RecurrentSpec:
    def __init__(self, *, width: int, num_gate_blocks: int, conv_width: int) -> None: ...

class LayerSpec:
    def __init__(
        self,
        *,
        mixer: AttentionSpec | RecurrentSpec,
        mlp_width: int,
        mlp_bias: bool,
        norm_after_mixer: bool,
        norm_after_mlp: bool,
    ) -> None: ...

class ModelSpec:
    def __init__(
        self,
        *,
        model_width: int,
        vocab_size: int,
        embedding_scale: float,
        norm_epsilon: float,
        final_softcap: float | None,
        layers: Sequence[LayerSpec],
    ) -> None: ...

class CpuStep(ModelStep):
    """The CPU backend. weights: canonical name → (format name, shape, uint8 bytes), which it keeps alive."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        weights: dict[str, tuple[str, tuple[int, ...], NDArray[np.uint8]]],
        plan: CachePlan,
        activations: str,
        kv_dtype: str,
        instruction_set: str,
        num_threads: int,
        max_step_tokens: int,
        max_logits_rows: int,
    ) -> None: ...
    def poison_cache(self) -> None:
        """Fills every cache page and state with NaN, for tests."""

class CudaDevice:
    """A GPU, through the driver's library. BackendError where library, GPU or a recent driver is missing."""

    def __init__(self, *, driver_library: str, ordinal: int) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> int:
        """Compute capability, 90 for 9.0."""

    @property
    def free_bytes(self) -> int: ...

class KernelImage:
    """A compiled kernel: a row of the manifest with its machine code. parameters: (name, type, multiple of 16)."""

    def __init__(
        self,
        *,
        op: str,
        symbol: str,
        constants: Mapping[str, int],
        parameters: Sequence[tuple[str, str, bool]],
        pointer_alignment_bytes: int,
        num_warps: int,
        dynamic_shared_bytes: int,
        hidden_pointers: int,
        dependent_launch: bool,
        code: bytes,
    ) -> None: ...

class GraphStep(ModelStep):
    """The GPU backend. formats: of every matrix, "bfloat16", "int8" or "int4", by canonical name.

    Weights are uploaded one part at a time before the first step. captures=False launches every kernel by itself.
    allocates=False takes no memory but for kernels, to ask how much it would be; such a step cannot run.
    """

    def __init__(
        self,
        *,
        device: CudaDevice,
        spec: ModelSpec,
        plan: CachePlan,
        formats: Mapping[str, str],
        kernels: Sequence[KernelImage],
        max_step_tokens: int,
        max_logits_rows: int,
        max_sequences: int,
        max_seq_len: int,
        captures: bool = True,
        allocates: bool = True,
    ) -> None: ...
    def upload(self, name: str, part: str, data: NDArray[np.uint8]) -> None:
        """part: "weight", "scales" or "factors" of a tensor, by canonical name."""

    @property
    def float32_tensors(self) -> set[str]:
        """Tensors that are uploaded as float32; all others are matrices in their format."""

    def finish_upload(self) -> None:
        """Error that names what is missing."""

    def poison_cache(self) -> None:
        """Fills every cache page with NaN, for tests."""

    @property
    def num_device_bytes(self) -> int:
        """Weights, cache and all that a step of the largest size needs."""

    @property
    def num_weight_bytes(self) -> int: ...
    @property
    def num_graphs(self) -> int: ...

def processor_name() -> str: ...
def instruction_sets() -> list[str]:
    """Sets this machine can run, plainest first."""

def choose_instruction_set(name: str) -> str:
    """ "auto" gives the widest set; BackendError for one that is unknown or not there."""

class ThreadPool:
    """The engine's thread pool, for tests and measurements."""

    def __init__(self, num_threads: int) -> None: ...
    @property
    def num_threads(self) -> int: ...
    def parallel_for(self, num_tasks: int, body: Callable[[int, int], object]) -> None: ...

def quantize_into(
    *,
    source: str,
    data: NDArray[np.uint8],
    cols: int,
    target: str,
    out: NDArray[np.uint8],
    pool: ThreadPool,
    instruction_set: str = "auto",
) -> int | None:
    """Fills `out` with rows of `cols` weights as strips of `target`; the first row that is not finite, if any.

    source: F32, F16 or BF16. The same bits on every instruction set. Call it from one thread at a time for a pool.
    """

class Ops:
    """The kernels of one instruction set on arrays, for tests and benchmarks. Results are new arrays unless named."""

    def __init__(self, instruction_set: str = "auto", num_threads: int = 1) -> None: ...
    @property
    def instruction_set(self) -> str: ...
    @property
    def kernel_seconds(self) -> float:
        """What the last call spent in the kernel itself."""

    def dequantize_row(
        self, format: str, data: NDArray[np.uint8], cols: int, rows: int = 1, row: int = 0
    ) -> NDArray[np.float32]: ...
    def matmul(
        self,
        format: str,
        data: NDArray[np.uint8],
        rows: int,
        x: NDArray[np.float32],
        row_begin: int = 0,
        row_end: int | None = None,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """[T, rows] of x [T, cols]; rows outside [row_begin, row_end) are left as in `out`, or NaN."""

    @staticmethod
    def pack_strips(format: str, data: NDArray[np.uint8], rows: int, cols: int) -> NDArray[np.uint8]:
        """A quantised matrix in the strips that `int8_matmul` reads."""

    def quantize_rows(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
        """x [T, cols] in groups of 128 columns: scales [G, T], integers [G, T, 128] and their sums [G, T]."""

    def int8_matmul(
        self,
        format: str,
        strips: NDArray[np.uint8],
        rows: int,
        x: NDArray[np.float32],
        first_strip: int = 0,
        end_strip: int | None = None,
        out: NDArray[np.float32] | None = None,
        strips_at_once: int = 2,
    ) -> NDArray[np.float32]:
        """[T, rows] of x [T, cols], which is quantised first; rows of other strips are left as in `out`, or NaN.

        strips_at_once: 1 to 4, what a thread takes in one call of the kernel.
        """

    def rms_norm(self, x: NDArray[np.float32], gain: NDArray[np.float32], epsilon: float) -> NDArray[np.float32]: ...
    def rms_norm_add(
        self, x: NDArray[np.float32], gain: NDArray[np.float32], epsilon: float, residual: NDArray[np.float32]
    ) -> NDArray[np.float32]: ...
    def add(self, x: NDArray[np.float32], residual: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def scale(self, x: NDArray[np.float32], factor: float) -> NDArray[np.float32]: ...
    def softcap(self, x: NDArray[np.float32], cap: float) -> NDArray[np.float32]: ...
    def geglu(self, gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def rope(
        self, x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]
    ) -> NDArray[np.float32]: ...
    def write_kv(
        self,
        pages: NDArray[np.float32] | NDArray[np.uint16],
        block_index: int,
        slot_in_page: int,
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
    ) -> None:
        """Changes `pages` [N, K, 2, D * P]."""

    def attention(
        self,
        queries: NDArray[np.float32],
        pages: NDArray[np.float32] | NDArray[np.uint16],
        block_table: NDArray[np.int32],
        first_position: int,
        kv_head: int,
        query_scale: float,
        score_softcap: float | None = None,
        window_keys: int | None = None,
    ) -> NDArray[np.float32]: ...
    def read(self, data: NDArray[np.uint8]) -> int:
        """Reads `data` with every thread; the number of bytes read."""

    def multiply_add(self, wanted: int) -> int:
        """Does at least about `wanted` float32 multiply-adds, whose number it returns."""

    def multiply_add_bytes(self, wanted: int) -> int:
        """The same for int8 into int32."""

class RecurrentOps:
    """The kernels of recurrent layers, as `Ops`. What a sequence carries on is a new array, too."""

    def __init__(self, instruction_set: str = "auto") -> None: ...
    @property
    def instruction_set(self) -> str: ...
    def conv1d(
        self,
        x: NDArray[np.float32],
        weights: NDArray[np.float32],
        bias: NDArray[np.float32],
        tail: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """x [T, R], weights [taps, R], tail [taps - 1, R]: the convolution [T, R] and the next tail."""

    def rg_lru(
        self,
        x: NDArray[np.float32],
        input_gate: NDArray[np.float32],
        recurrence_gate: NDArray[np.float32],
        log_decay: NDArray[np.float32],
        state: NDArray[np.float32],
        starts: bool,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """x and gates [T, R], log_decay and state [R]: the rows [T, R] and the last state."""
