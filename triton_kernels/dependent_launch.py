"""Kernels that begin while the one before them still runs (compute capability 9.0 on): "programmatic dependent launch".

What a kernel does before it waits overlaps with the end of its predecessor. So before that it may read weights and what
lies there before the first kernel of a chain begins, and write nothing. It waits even if it then has nothing to do:
that its predecessor has finished says nothing of the one before, unless that predecessor has waited too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gemma2_fast.triton_kernels.numerics import INTERPRETED

FIRST_ARCH = 90


@triton.jit
def wait_for_predecessor(DEPENDENT: tl.constexpr):
    """Until all that the kernel before wrote can be read; then lets the next one begin. Interpreted: nothing."""
    if DEPENDENT and not INTERPRETED:
        gdc_wait()
        gdc_launch_dependents()
