from __future__ import annotations

import pytest

from gemma2_fast import _core


@pytest.fixture(params=_core.instruction_sets())
def ops(request: pytest.FixtureRequest) -> _core.Ops:
    """The C++ ops, once for each instruction set of this machine."""
    ops = _core.Ops(request.param)
    assert ops.instruction_set == request.param
    return ops


@pytest.fixture(params=_core.instruction_sets())
def recurrent_ops(request: pytest.FixtureRequest) -> _core.RecurrentOps:
    """The C++ ops of recurrent layers, once for each instruction set of this machine."""
    ops = _core.RecurrentOps(request.param)
    assert ops.instruction_set == request.param
    return ops
