"""What is compiled ahead of time: a kernel with its types, its constants and what its arguments promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DEPENDENT = "DEPENDENT"
POINTER_ALIGNMENT = 16  # bytes, of every tensor handed to a kernel: loads may be that wide


@dataclass(frozen=True)
class Specialisation:
    """`types`: Triton's names ("*bf16", "i32", "fp32") of the arguments that are left at run time.

    divisible: integer arguments that are always multiples of 16. Pointers always are, in bytes.
    contracts: a product and a sum may become one operation, which rounds once.
    """

    op: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, int | bool]
    divisible: frozenset[str] = field(default=frozenset())
    num_warps: int = 4
    num_stages: int = 3
    contracts: bool = True

    @property
    def name(self) -> str:
        """Unique among all: the op, and each constant and type that tells it from its siblings."""
        constants = [f"{key.lower()}{int(value)}" for key, value in self.constants.items()]
        pointers = dict.fromkeys(kind[1:] for kind in self.types.values() if kind.startswith("*"))
        return "_".join((self.op, *constants, *pointers))

    @property
    def may_depend(self) -> bool:
        """Whether the kernel knows how to begin before its predecessor ends (dependent_launch.py). That is up to the
        processor, and no constant that a launcher chooses by."""
        return DEPENDENT in self.kernel.arg_names

    def signature(self) -> dict[str, str]:
        """Of every argument of the kernel, in the kernel's own order, as Triton's compiler takes it."""
        names = [name for name in self.kernel.arg_names if name != DEPENDENT]
        if missing := [name for name in names if (name in self.types) == (name in self.constants)]:
            raise ValueError(f"{self.op}: {', '.join(missing)} must be an argument or a constant, and not both")
        if unknown := [name for name in (*self.types, *self.constants) if name not in names]:
            raise ValueError(f"{self.op}: the kernel has no {', '.join(unknown)}")
        return {name: self.types.get(name, "constexpr") for name in self.kernel.arg_names}

    def promises(self) -> dict[tuple[int], list[list[object]]]:
        """For the compiler: what is known of an argument's value. A launcher must see to it."""
        hinted = [
            index
            for index, name in enumerate(self.kernel.arg_names)
            if self.types.get(name, "").startswith("*") or name in self.divisible
        ]
        return {(index,): [["tt.divisibility", 16]] for index in hinted}
