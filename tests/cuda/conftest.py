from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda.fake_gpu import build_fake_driver


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))
