"""What the planner predicts is what the meter measures, within 10 %."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from core_fpdt.planning.hardware import hardware
from core_fpdt.planning.job import Job
from core_fpdt.planning.memory import Memory, memory
from core_fpdt.planning.shape import from_config
from core_fpdt.settings import FPDTSettings

BASE: dict[str, Any] = {"chunk_tokens": 256, "offload": "file", "loss_chunk_bytes": 2**20}
CASES: list[dict[str, Any]] = [
    {},
    {"keep_output": 0.0},
    {"keep_keys": False},
    {"keep_output": 0.0, "keep_keys": False, "order": "key"},
    {"order": "key"},
    {"chunk_tokens": 512},
    {"mlp_chunks": 4},
    {"loss_chunk_bytes": 2**24},
    {"offload": "none"},
    {"offload": "none", "keep_output": 0.0, "keep_keys": False},
    {"offload": "host", "delay": 1e-6},
]


def predicted(steps: Any, tokens: int, settings: dict[str, Any]) -> Memory:
    job = Job(
        shape=from_config(steps.model.config),
        hardware=hardware("cpu"),
        sequence=tokens,
        settings=FPDTSettings(**settings),
        element=4,
        states="none",
    )
    return memory(job)


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_peaks_of_settings(small_vocabulary: Any, changes: dict[str, Any]) -> None:
    settings = BASE | changes
    gc.collect()
    meter = small_vocabulary.chunked(1800, **settings)
    plan = predicted(small_vocabulary, 1800, settings)
    assert plan.activations == pytest.approx(meter.peak, rel=0.1)
    assert plan.host_bytes == pytest.approx(meter.host_peak, rel=0.1)
