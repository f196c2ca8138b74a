from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda.fake_gpu import build_fake_driver

ANOTHERS_CONTEXT = 0xA11CE


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(autouse=True)
def _nothing_is_left(driver_library: Path) -> Iterator[None]:
    """Of what was made on the device nothing stays, nothing was done outside of its context, and the thread finds the
    context again that another library had made current."""
    driver = ctypes.CDLL(str(driver_library))
    before = driver.fake_num_living()
    assert driver.cuCtxPushCurrent_v2(ctypes.c_void_p(ANOTHERS_CONTEXT)) == 0
    yield
    driver.fake_recover()
    current = ctypes.c_void_p()
    assert driver.cuCtxPopCurrent_v2(ctypes.byref(current)) == 0
    assert current.value == ANOTHERS_CONTEXT, "the context of another library is no longer current"
    assert driver.cuCtxPopCurrent_v2(ctypes.byref(current)) != 0, "the thread has more contexts than before"
    assert driver.fake_contexts_left() == 0, "a thread ended with a context"
    assert driver.fake_calls_outside() == 0, "a call was made outside of the device's context"
    assert driver.fake_num_living() == before, "something on the device was not given back"
