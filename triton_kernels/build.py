"""Compiles kernels ahead of time, for processors that this machine need not have: cubins and a manifest.

    python -m gemma2_fast.triton_kernels.build --out build/cubins --targets 90,100 --ops geglu

The manifest says of every cubin how it is launched and what it needs. With --refuse-spills a kernel
that spills registers fails the build unless it is named in ALLOWED_SPILLS.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gemma2_fast.triton_kernels import (
    attention_decode,
    attention_prefill,
    conv1d,
    dependent_launch,
    embed,
    geglu,
    manifest,
    matmul,
    matmul_tiled,
    rg_lru,
    rg_lru_step,
    rms_norm,
    rope,
    sample,
)
from gemma2_fast.triton_kernels.specialisation import DEPENDENT, POINTER_ALIGNMENT, Specialisation

# Compute capabilities, and the bytes of shared memory that one program may have there.
TARGETS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
OPS = {
    "attention_prefill": attention_prefill.specialisations,
    "attention_decode": attention_decode.specialisations,
    "conv1d": conv1d.specialisations,
    "embed": embed.specialisations,
    "geglu": geglu.specialisations,
    "matmul": matmul.specialisations,
    "matmul_tiled": matmul_tiled.specialisations,
    "rg_lru_gates": rg_lru.gates_specialisations,
    "rg_lru_scan": rg_lru.scan_specialisations,
    "rg_lru_step": rg_lru_step.specialisations,
    "rms_norm": rms_norm.specialisations,
    "rope": rope.specialisations,
    "sample": sample.specialisations,
}
SPILLS_CHECKED_ON = 90
# Name of a specialisation: why.
ALLOWED_SPILLS = {
    "attention_decode_capped0_windowed0_group1_head_dim256_page64_rows16_block64_bf16_i32_fp32": (
        "8 bytes by the assembler of Triton 3.6 alone, at 168 registers; smaller blocks halve what is under way"
    ),
    "attention_decode_capped0_windowed0_group2_head_dim256_page64_rows16_block64_bf16_i32_fp32": "the same",
    "matmul_format2_biased0_geglu1_gather0_tokens1_group128_rows8_cols2048_bf16_i32_u8_fp32": (
        "8 bytes by the assembler of Triton 3.9 alone, at 128 registers; fewer rows have more work with the token"
    ),
    "sample_draw_capped1_block2048_blocks128_keep16_fp32_i32_i64_fp64": (
        "8 bytes by the assembler of Triton 3.6 alone, at 80 registers; half the warps take twice the steps"
    ),
}
PTX_ARCH = 80  # whose PTX the driver of any later GPU can compile
HIDDEN_POINTERS = 2  # after the arguments: Triton's scratch, null where none is needed

# What Triton says of a kernel that needs nothing else.
PLAIN_LAUNCH = {
    "global_scratch_size": 0,
    "profile_scratch_size": 0,
    "num_ctas": 1,
    "launch_cooperative_grid": False,
}


@dataclass(frozen=True)
class Compiled:
    name: str  # of the specialisation
    arch: int
    cubin: bytes
    ptx: str
    entry: dict[str, Any]  # of the manifest
    registers: int
    spilled_bytes: int  # of a thread's stack

    def files(self) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        """Name, content and row of the manifest: the cubin, and PTX where later GPUs are to have it."""
        stem = f"{self.name}.sm_{self.arch}"
        yield self._file(f"{stem}.cubin", self.cubin)
        if self.arch == PTX_ARCH:
            yield self._file(f"{stem}.ptx", self.ptx.encode())

    def _file(self, name: str, content: bytes) -> tuple[str, bytes, dict[str, Any]]:
        is_ptx = name.endswith(".ptx")
        return name, content, {"file": name, "ptx": is_ptx, "sha256": hashlib.sha256(content).hexdigest(), **self.entry}

    def line(self) -> str:
        entry = self.entry
        return (
            f"sm_{self.arch:<4} {self.registers:4} registers {self.spilled_bytes:5} bytes spilled "
            f"{entry['shared_bytes']:7} bytes shared {len(self.cubin):7} bytes  {self.name}"
        )


def compile_for(specialisation: Specialisation, arch: int) -> Compiled:
    """One cubin, with everything that a launcher must know. Needs no GPU."""
    dependent = specialisation.may_depend and arch >= dependent_launch.FIRST_ARCH
    source = ASTSource(
        fn=specialisation.kernel,
        signature=specialisation.signature(),
        constexprs={**specialisation.constants, **({DEPENDENT: dependent} if specialisation.may_depend else {})},
        attrs=specialisation.promises(),
    )
    # Contraction is said explicitly: Triton 3.10 changes its default, and cubins would differ.
    options = {
        "num_warps": specialisation.num_warps,
        "num_stages": specialisation.num_stages,
        "enable_fp_fusion": specialisation.contracts,
        "launch_pdl": dependent,
    }
    with triton.knobs.compilation.scope():
        # Lines of source and the text of the PTX would be two thirds of a cubin.
        triton.knobs.compilation.disable_line_info = True
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin, ptx, metadata = compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata
    num_arguments = sum(kind != "constexpr" for kind in specialisation.signature().values())
    check_launch(specialisation.name, ptx, num_arguments, metadata)
    registers, spilled_bytes = resource_usage(cubin)
    entry = {
        "op": specialisation.op,
        "name": specialisation.name,
        "arch": arch,
        "ptx_target": ptx.partition(".target ")[2].split()[0],  # sm_90a runs on 9.0 and nothing else
        "symbol": metadata.name,
        "arguments": [
            {
                "name": name,
                "type": kind,
                "divisible_by_16": not kind.startswith("*") and name in specialisation.divisible,
            }
            for name, kind in specialisation.signature().items()
            if kind != "constexpr"
        ],
        "constants": {key: int(value) for key, value in specialisation.constants.items()},
        "pointer_alignment_bytes": POINTER_ALIGNMENT,
        "num_warps": metadata.num_warps,
        "shared_bytes": metadata.shared,
        "hidden_pointers": HIDDEN_POINTERS,
        "dependent_launch": metadata.launch_pdl,
        "triton_version": triton.__version__,
    }
    return Compiled(specialisation.name, arch, cubin, ptx, entry, registers, spilled_bytes)


def check_launch(name: str, ptx: str, num_arguments: int, metadata: Any) -> None:
    """RuntimeError where a kernel needs more than its arguments, two null pointers and a launch, plain or dependent."""
    num_parameters = ptx.partition(".entry")[2].partition(")")[0].count(".param")
    if num_parameters != num_arguments + HIDDEN_POINTERS:
        raise RuntimeError(f"{name} has {num_parameters} parameters, expected {num_arguments} and {HIDDEN_POINTERS}")
    found = {key: getattr(metadata, key) for key in PLAIN_LAUNCH}
    if other := {key: value for key, value in found.items() if value != PLAIN_LAUNCH[key]}:
        raise RuntimeError(f"{name} needs a launch that is not described: {other}")
    if metadata.launch_pdl != ("griddepcontrol.wait" in ptx):
        raise RuntimeError(f"{name} must wait for its predecessor if it is launched before that ends, and only then")


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, where spilled registers lie."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with _temporary(cubin) as path:
        text = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"{tool} printed no register count: {text.strip()}")
    return int(found[1]), int(found[2])


def needed(arch: int, ops: Iterable[str] = OPS) -> Iterator[Specialisation]:
    for op in ops:
        yield from OPS[op](arch)


def build(directory: Path, targets: Sequence[int], ops: Sequence[str], refuse_spills: bool) -> list[Compiled]:
    """Writes the cubins and manifest.json; gives what was compiled. RuntimeError where one asks for too much: then
    nothing is written."""
    done = []
    for compiled in compile_all(targets, ops):
        done.append(compiled)
        print(compiled.line(), flush=True)
    if found := [fault for compiled in done for fault in faults(compiled, refuse_spills)]:
        raise RuntimeError("; ".join(found))
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, content, row in (file for compiled in done for file in compiled.files()):
        (directory / name).write_bytes(content)
        rows.append(row)
    written = {"version": manifest.VERSION, "sources": manifest.sources_digest(), "kernels": rows}
    (directory / manifest.FILE_NAME).write_text(json.dumps(written, indent=1), encoding="utf-8")
    return done


def compile_all(targets: Sequence[int], ops: Sequence[str]) -> Iterator[Compiled]:
    """On all processors, in a process each."""
    cases = [(arch, op, index) for arch in targets for op in ops for index, _ in enumerate(OPS[op](arch))]
    processes = min(len(os.sched_getaffinity(0)), len(cases))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_case, cases)


def _compile_case(case: tuple[int, str, int]) -> Compiled:
    arch, op, index = case
    return compile_for(list(OPS[op](arch))[index], arch)


def faults(compiled: Compiled, refuse_spills: bool) -> Iterator[str]:
    """Why a kernel would not run, or with `refuse_spills` not well."""
    name, limit = compiled.name, TARGETS[compiled.arch]
    if compiled.entry["shared_bytes"] > limit:
        yield (
            f"{name} takes {compiled.entry['shared_bytes']} bytes of shared memory, sm_{compiled.arch} has {limit}: "
            "use smaller tiles or fewer stages there (tuning.json)"
        )
    if (
        refuse_spills
        and compiled.arch == SPILLS_CHECKED_ON
        and compiled.spilled_bytes > 0
        and name not in ALLOWED_SPILLS
    ):
        yield (
            f"{name} spills {compiled.spilled_bytes} bytes of registers on sm_{compiled.arch}: use smaller tiles or "
            "more warps (tuning.json), or name it in ALLOWED_SPILLS with a reason"
        )


@contextlib.contextmanager
def _temporary(content: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        yield file.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the cubins and manifest.json")
    parser.add_argument("--targets", type=_some_of(tuple(TARGETS), int), default=tuple(TARGETS), help="default: all")
    parser.add_argument("--ops", type=_some_of(tuple(OPS), str), default=tuple(OPS), help="default: all")
    parser.add_argument(
        "--refuse-spills", action="store_true", help="fail where a kernel spills that is not allowed to"
    )
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so that nothing is compiled: unset it")
    try:
        done = build(args.out, args.targets, args.ops, args.refuse_spills)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(done)} cubins, {sum(len(c.cubin) for c in done) / 1e6:.1f} MB, in {args.out}")
    return 0


def _some_of(known: Sequence[Any], kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        chosen = tuple(kind(part) for part in text.split(","))
        if unknown := [part for part in chosen if part not in known]:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}: expected some of {known}")
        return chosen

    return parse


if __name__ == "__main__":
    sys.exit(main())
