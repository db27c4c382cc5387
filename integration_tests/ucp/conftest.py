"""Real runs of other frameworks, shared by the tests of core-ucp."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Generator[object]:
    """Runs DeepSpeed; see :mod:`ucp.deepspeed_runs`."""
    pytest.importorskip("deepspeed")
    from ucp.deepspeed_runs import Lab

    runs = Lab(tmp_path_factory.mktemp("deepspeed"))
    yield runs
    runs.close()
