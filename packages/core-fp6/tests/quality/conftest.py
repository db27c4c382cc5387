"""The benchmark of quality, whose models and weights the tests use too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality.py"


@pytest.fixture(scope="session")
def benchmark() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("core_fp6_quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["core_fp6_quality"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def toy(benchmark: ModuleType) -> Any:
    """A byte-level Llama that was trained for some seconds."""
    return benchmark.train(steps=100)
