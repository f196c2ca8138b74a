"""Compilation for processors that this machine does not have, and what the manifest says of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gemma2_fast.triton_kernels import build
from gemma2_fast.triton_kernels.build import Compiled, Specialisation
from gemma2_fast.triton_kernels.manifest import read_manifest
from gemma2_fast.triton_kernels.tuning import tuned
from tests.triton_kernels.compiler import Result, compile_named, compile_with, compilers


def largest(op: str, arch: int, **constants: int) -> str:
    """The specialisation with most of its constants switched on: a cap, a window, a norm, several tokens."""
    chosen = [s for s in build.needed(arch, [op]) if constants.items() <= s.constants.items()]
    return max(chosen, key=lambda s: sum(s.constants.values()) + 10**6 * s.constants.get("TOKENS", 0)).name


# Everything for one target, one of each op for the others, and of decode attention one of each number of rows.
FULL = build.SPILLS_CHECKED_ON
OTHERS = [arch for arch in build.TARGETS if arch != FULL]
CASES = [(s.name, FULL) for s in build.needed(FULL)]
CASES += [(largest(op, arch), arch) for arch in OTHERS for op in build.OPS]
CASES += [(largest("attention_decode", arch, ROWS=rows), arch) for arch in OTHERS for rows in (16, 32, 64)]
MATMUL_INT8 = "matmul_format1_biased0_geglu0_gather0_tokens1_group128_rows8_cols1024_bf16_i32_i8_u8_fp32"
MATMUL_INT4 = "matmul_format2_biased0_geglu0_gather0_tokens1_group128_rows8_cols2048_bf16_i32_u8_fp32"
PREFILL = "attention_prefill_capped{}_windowed1_group2_head_dim256_page64_tile128_block32_bf16_i32"
DECODE = "attention_decode_capped{}_windowed1_group2_head_dim256_page64_rows16_block64_bf16_i32_fp32"


@dataclass(frozen=True)
class Compilation:
    started: dict[tuple[str, int], Future[Result]]

    def of(self, name: str, arch: int) -> Result:
        return self.started[name, arch].result()


@pytest.fixture(scope="module")
def compilation() -> Iterator[Compilation]:
    """All cases, compiled side by side."""
    with compilers() as pool:
        yield Compilation({case: pool.submit(compile_named, *case) for case in CASES})


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_every_kernel_compiles_and_fits(compilation: Compilation, name: str, arch: int) -> None:
    result = compilation.of(name, arch)
    assert result.cubin[:4] == b"\x7fELF"
    assert b"debug_ptx_txt" not in result.cubin
    assert f".target sm_{arch}" in result.ptx
    assert f".entry {result.entry['symbol']}(" in result.ptx
    assert 0 < result.registers <= 255
    assert result.faults == []


def test_the_parameters_are_the_arguments_and_two_scratch_pointers(compilation: Compilation) -> None:
    result = compilation.of("geglu_block1024_bf16", FULL)
    head = result.ptx.partition(".entry")[2].partition(")")[0]
    kinds = [line.split()[1] for line in head.splitlines() if ".param" in line]
    assert kinds == [".u64", ".u64", ".u32", ".u64", ".u64"]
    assert result.entry["arguments"] == [
        {"name": "gate_up", "type": "*bf16", "divisible_by_16": False},
        {"name": "out", "type": "*bf16", "divisible_by_16": False},
        {"name": "width", "type": "i32", "divisible_by_16": True},
    ]


@pytest.mark.parametrize("op", [PREFILL, DECODE])
def test_a_cap_is_one_instruction(compilation: Compilation, op: str) -> None:
    """The interpreter takes another way, so only this shows which one a GPU takes."""
    assert "tanh.approx.f32" in compilation.of(op.format(1), FULL).ptx
    assert "tanh" not in compilation.of(op.format(0), FULL).ptx


@pytest.mark.parametrize(
    "name",
    [
        *(largest(op, FULL) for op in ("conv1d", "geglu", "matmul", "matmul_tiled", "rg_lru_gates", "rms_norm")),
        *(PREFILL.format(1), DECODE.format(1), largest("attention_decode", FULL)),
    ],
)
def test_loads_are_wide(compilation: Compilation, name: str) -> None:
    """Sixteen bytes a thread: what the promises of alignment are for."""
    ptx = compilation.of(name, FULL).ptx
    assert re.search(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global", ptx)


def test_a_scale_is_loaded_for_many_weights(compilation: Compilation) -> None:
    """Of one token: for the 16 codes of a load, which all lie in one group."""
    ptx = compilation.of(MATMUL_INT8, FULL).ptx
    assert 0 < len(re.findall(r"ld\.global\S*\.b16", ptx)) <= len(re.findall(r"ld\.global\S*evict_first\S*\.v4", ptx))


def test_int4_codes_become_numbers_without_a_conversion(compilation: Compilation) -> None:
    """Of one token: their bits become those of a float, 128 codes a thread and round; only factors are converted."""
    ptx = compilation.of(MATMUL_INT4, FULL).ptx
    assert ptx.count("1258291200") >= 128  # 0x4B000000
    assert len(re.findall(r"cvt\.rn\.f32\.s", ptx)) <= 8
    assert len(re.findall(r"ld\.global\S*evict_first\S*\.v4\.b32", ptx)) == 2 * 4  # of the first block and the next


def test_products_run_on_the_matrix_units(compilation: Compilation) -> None:
    assert "wgmma.mma_async" in compilation.of(PREFILL.format(1), FULL).ptx
    assert "mma.sync" in compilation.of(DECODE.format(1), FULL).ptx
    assert "wgmma.mma_async" in compilation.of(largest("attention_decode", FULL, ROWS=64), FULL).ptx
    assert "mma" in compilation.of(largest("matmul", FULL), FULL).ptx
    assert "wgmma.mma_async" in compilation.of(largest("rg_lru_gates", FULL), FULL).ptx
    assert "mma.sync" in compilation.of(largest("rg_lru_step", FULL), FULL).ptx
    for name in (name for name, arch in CASES if arch == FULL and name.startswith("matmul_tiled")):
        assert "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16" in compilation.of(name, FULL).ptx


@pytest.mark.parametrize("op", ["rg_lru_scan", "rg_lru_step"])
def test_the_logarithm_near_one_is_exact(compilation: Compilation, op: str) -> None:
    """The interpreter's always is, so only this shows that a GPU does not take the instruction, off by 2^-22 there."""
    assert "lg2.approx" not in compilation.of(largest(op, FULL), FULL).ptx


@pytest.mark.parametrize("op", ["sample_weigh", "sample_draw"])
def test_weights_are_rounded_as_the_hosts(compilation: Compilation, op: str) -> None:
    """The interpreter contracts nothing and divides exactly, so only this shows that a GPU does the same."""
    (name,) = (name for name, arch in CASES if arch == FULL and name.startswith(f"{op}_capped1_block2048_blocks128"))
    ptx = compilation.of(name, FULL).ptx
    assert "div.rn.f32" in ptx
    assert not re.search(r"fma\.|div\.(full|approx)|ex2\.approx", ptx)


DEPENDENT_OPS = ("attention_decode", "embed", "matmul", "rms_norm", "rope", "sample")
LOADS = r"ld\.global|cp\.async"


@pytest.mark.parametrize("op", build.OPS)
def test_kernels_of_a_decode_step_wait_for_their_predecessor(compilation: Compilation, op: str) -> None:
    """In all of them, before they load what it may have written; older processors do not know the instruction."""
    for specialisation in build.needed(FULL, [op]):
        result = compilation.of(specialisation.name, FULL)
        assert result.entry["dependent_launch"] == (op in DEPENDENT_OPS)
        assert result.ptx.count("griddepcontrol.wait") == (op in DEPENDENT_OPS)
        assert result.ptx.count("griddepcontrol.launch_dependents") == (op in DEPENDENT_OPS)
        before = result.ptx.partition("griddepcontrol.wait")[0]
        if op in DEPENDENT_OPS:
            assert "st.global" not in before
            assert op in ("matmul", "rms_norm") or not re.search(LOADS, before)
    old = compilation.of(largest(op, 80), 80)
    assert not old.entry["dependent_launch"]
    assert "griddepcontrol" not in old.ptx


def test_only_weights_are_loaded_before_the_wait(compilation: Compilation) -> None:
    """Of a matmul the first block's, not the tokens, which are to stay in the cache; of a norm the gains."""
    for specialisation in build.needed(FULL, ["matmul"]):
        before, _, after = compilation.of(specialisation.name, FULL).ptx.partition("griddepcontrol.wait")
        assert re.search(r"ld\.global\S*evict_first", before)
        assert "ld.global.L1::evict_last" not in before
        assert "ld.global.L1::evict_last" in after
    for specialisation in build.needed(FULL, ["rms_norm"]):
        before = compilation.of(specialisation.name, FULL).ptx.partition("griddepcontrol.wait")[0]
        vectors = specialisation.constants["BLOCK"] // (32 * specialisation.num_warps * 4)
        num_gains = 1 + specialisation.constants.get("HAS_AFTER", 0)
        assert len(re.findall(r"ld\.global\S*\.v4\.b32", before)) == vectors * num_gains


def test_splits_meet_behind_a_barrier(compilation: Compilation) -> None:
    """The interpreter runs one program after another, so only this shows that all threads have stored their part before
    one reports it, whoever put the barrier there, and that parts are read past the first-level cache."""
    for name in (DECODE.format(1), largest("attention_decode", FULL)):
        before, atomic, after = compilation.of(name, FULL).ptx.partition("atom.global.gpu.acq_rel")
        assert atomic
        stored = before.rpartition("st.global")[2]
        assert "bar.sync" in stored
        assert "ld.global.cg" in after


def test_a_launch_of_one_token() -> None:
    """Where Triton itself launches, an argument that is 1 is a number to its compiler and has no type."""
    with compilers() as pool:
        for op, argument in (
            ("rg_lru_gates", "num_tokens"), ("rg_lru_scan", "num_tokens"), ("rg_lru_step", "num_sequences"),
        ):  # fmt: skip
            pool.submit(compile_with, op, FULL, {argument: 1}).result()


def run_build(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gemma2_fast.triton_kernels.build", "--out", str(directory), *options]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=compiling)


def test_a_build_is_what_a_launcher_reads(tmp_path: Path) -> None:
    """Machine code for its own target; for later ones that have none, the PTX of the oldest."""
    done = run_build(tmp_path, "--targets", "80,90", "--ops", "geglu")
    assert done.returncode == 0, done.stderr
    assert "2 cubins" in done.stdout
    (geglu_90,), (geglu_80,), (geglu_120,) = (read_manifest(tmp_path, arch) for arch in (90, 80, 120))
    assert (geglu_90.file, geglu_90.ptx) == ("geglu_block1024_bf16.sm_90.cubin", False)
    assert [(a.name, a.divisible_by_16) for a in geglu_90.arguments] == [
        ("gate_up", False),
        ("out", False),
        ("width", True),
    ]
    assert geglu_90.code[:4] == b"\x7fELF"
    assert (geglu_80.arch, geglu_80.ptx) == (80, False)
    assert (geglu_120.arch, geglu_120.ptx) == (80, True)
    assert b".target sm_80\n" in geglu_120.code
    assert f".entry {geglu_120.symbol}(".encode() in geglu_120.code
    assert read_manifest(tmp_path, 75) == []
    rows = json.loads((tmp_path / "manifest.json").read_text())["kernels"]
    assert {row["file"] for row in rows} == {p.name for p in tmp_path.iterdir()} - {"manifest.json"}


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--targets", "70"], "unknown 70: expected some of (80, 86"), (["--ops", "gelu"], "unknown 'gelu'")],
)
def test_what_does_not_exist_is_refused(option: list[str], message: str, tmp_path: Path) -> None:
    done = run_build(tmp_path, *option)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_build_without_a_compiler_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gemma2_fast.triton_kernels.build", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_a_refused_build_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compile_all", lambda targets, ops: [compiled(spilled_bytes=8)])
    with pytest.raises(RuntimeError, match="geglu_block1024_bf16 spills 8 bytes"):
        build.build(tmp_path, [90], ["geglu"], refuse_spills=True)
    assert list(tmp_path.iterdir()) == []


def test_a_launch_that_is_not_described_is_refused() -> None:
    ptx = ".visible .entry k(\n.param .u64 a,\n.param .u64 b,\n.param .u64 c\n)\n"
    plain = {**build.PLAIN_LAUNCH, "launch_pdl": False}
    build.check_launch("k", ptx, 1, SimpleNamespace(**plain))
    build.check_launch("k", ptx + "griddepcontrol.wait;", 1, SimpleNamespace(**plain | {"launch_pdl": True}))
    with pytest.raises(RuntimeError, match="k has 3 parameters, expected 2 and 2"):
        build.check_launch("k", ptx, 2, SimpleNamespace(**plain))
    with pytest.raises(RuntimeError, match="not described: {'num_ctas': 2}"):
        build.check_launch("k", ptx, 1, SimpleNamespace(**plain | {"num_ctas": 2}))
    for text, dependent in ((ptx, True), (ptx + "griddepcontrol.wait;", False)):
        with pytest.raises(RuntimeError, match="k must wait for its predecessor"):
            build.check_launch("k", text, 1, SimpleNamespace(**plain | {"launch_pdl": dependent}))


def geglu() -> Specialisation:
    (only,) = build.needed(90, ["geglu"])
    return only


def compiled(**changes: Any) -> Compiled:
    usual = Compiled(geglu().name, 90, b"", "", {"shared_bytes": 0}, registers=30, spilled_bytes=0)
    return replace(usual, **changes)


def test_a_spill_is_a_fault_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(build.faults(compiled(), True)) == []
    (fault,) = build.faults(compiled(spilled_bytes=8), True)
    assert "geglu_block1024_bf16 spills 8 bytes" in fault
    assert list(build.faults(compiled(spilled_bytes=8, arch=80), True)) == []
    assert list(build.faults(compiled(spilled_bytes=8), False)) == []
    monkeypatch.setitem(build.ALLOWED_SPILLS, geglu().name, "because")
    assert list(build.faults(compiled(spilled_bytes=8), True)) == []


def test_too_much_shared_memory_is_a_fault() -> None:
    assert list(build.faults(compiled(entry={"shared_bytes": 200_000}), True)) == []
    (fault,) = build.faults(compiled(entry={"shared_bytes": 200_000}, arch=89), True)
    assert "takes 200000 bytes of shared memory, sm_89 has 101376" in fault


def test_a_shape_without_block_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention_prefill for sm_90 and {'head_dim': 96}"):
        tuned("attention_prefill", 90, head_dim=96)


def test_every_argument_is_accounted_for() -> None:
    whole = geglu()
    with pytest.raises(ValueError, match="geglu: width must be an argument or a constant"):
        replace(whole, types={k: v for k, v in whole.types.items() if k != "width"}).signature()
    with pytest.raises(ValueError, match="the kernel has no depth"):
        replace(whole, types={**whole.types, "depth": "i32"}).signature()


@pytest.mark.parametrize("arch", build.TARGETS)
def test_names_tell_all_specialisations_apart(arch: int) -> None:
    names = [s.name for s in build.needed(arch)]
    assert len(set(names)) == len(names)
