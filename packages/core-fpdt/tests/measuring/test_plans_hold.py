"""What the planner predicts is what the meter measures, within 10 %."""

from __future__ import annotations

from typing import Any

import pytest

from core_fpdt.planning.hardware import hardware
from core_fpdt.planning.job import Job
from core_fpdt.planning.memory import Memory, memory
from core_fpdt.planning.shape import from_config
from core_fpdt.settings import FPDTSettings

SMALL: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
BASE: dict[str, Any] = {"chunk_tokens": 128, "offload": "file", "loss_chunk_bytes": 2**19}
STAGED: dict[str, Any] = {"offload": "host", "delay": 1e-6}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"keep_output": 0.0},
    {"keep_output": 0.5},
    {"keep_keys": False},
    {"order": "key"},
    {"order": "key", "keep_output": 0.0, "keep_keys": False},
    {"chunk_tokens": 64},
    {"chunk_tokens": 4096},
    {"mlp_chunks": 4},
    {"loss_chunk_bytes": 2**24},
    {"offload": "none"},
    {"offload": "none", "keep_output": 0.0, "keep_keys": False},
    STAGED,
    STAGED | {"order": "key"},
    STAGED | {"keep_output": 0.5},
    STAGED | {"keep_output": 0.0, "keep_keys": False},
]
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"intermediate_size": 32, "num_key_value_heads": 4}),
    ("Llama", {"hidden_size": 128, "num_key_value_heads": 1}),
    ("Qwen3", {"head_dim": 16}),
    ("Mixtral", {"num_local_experts": 4}),
    ("GPT2", {"n_inner": 256, "num_key_value_heads": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
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


def require_equal(steps: Any, tokens: int, settings: dict[str, Any]) -> None:
    meter = steps.chunked(tokens, **settings)
    plan = predicted(steps, tokens, settings)
    assert plan.activations == pytest.approx(meter.peak, rel=0.1)
    assert plan.host_bytes == pytest.approx(meter.host_peak, rel=0.1)


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_peaks_with_other_settings(steps: Any, changes: dict[str, Any]) -> None:
    require_equal(steps(**SMALL), 900, BASE | changes)


@pytest.mark.parametrize(("family", "config"), SHAPES, ids=str)
@pytest.mark.parametrize("changes", [{}, STAGED], ids=["files", "staged"])
def test_peaks_of_other_shapes(
    steps: Any, family: str, config: dict[str, Any], changes: dict[str, Any]
) -> None:
    require_equal(steps(family, **SMALL | config), 900, BASE | changes)


@pytest.mark.parametrize("tokens", [100, 450, 1800])
def test_peaks_at_other_lengths(steps: Any, tokens: int) -> None:
    require_equal(steps(**SMALL), tokens, BASE)
