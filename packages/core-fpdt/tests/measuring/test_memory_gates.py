"""What one more token costs on the device, against training as it is done elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from core_fpdt.measuring import per_token

FILES: dict[str, Any] = {"chunk_tokens": 256, "offload": "file", "loss_chunk_bytes": 2**23}
SIMULATED = FILES | {"offload": "host", "delay": 1e-6}


@pytest.mark.parametrize("settings", [FILES, SIMULATED], ids=["files", "simulated device"])
def test_a_token_costs_a_sixteenth_of_plain_training(
    large_vocabulary: Any, settings: dict[str, Any]
) -> None:
    """And a sixth of gradient checkpointing, with the vocabulary of 32,000 that both have."""
    steps = large_vocabulary
    ours = per_token(lambda n: steps.chunked(n, **settings).peak, 1024, 2048)
    plain = per_token(lambda n: steps.plain(n).peak, 256, 512)
    checkpointed = per_token(lambda n: steps.checkpointed(n).peak, 256, 512)
    assert plain / ours >= 16
    assert checkpointed / ours >= 6
    # Three residual streams in float32, rotary tables, ids: nothing else grows.
    assert ours <= 4 * (3 * 128 + 2 * 32) + 64


def test_layers_alone_cost_less_too(small_vocabulary: Any) -> None:
    """The vocabulary is not what makes the difference: here it is small, and its loss in chunks."""
    steps = small_vocabulary
    settings = FILES | {"loss_chunk_bytes": 2**20}
    ours = per_token(lambda n: steps.chunked(n, **settings).peak, 1024, 2048)
    plain = per_token(lambda n: steps.plain(n).peak, 512, 1024)
    checkpointed = per_token(lambda n: steps.checkpointed(n).peak, 512, 1024)
    assert plain / ours >= 16
    assert checkpointed / ours >= 6


def test_chunks_that_are_not_moved_cost_what_is_kept(small_vocabulary: Any) -> None:
    """Inputs, outputs, lse, keys and values of four layers, and sums of keys and values of one."""
    settings = FILES | {"offload": "none", "loss_chunk_bytes": 2**20}
    ours = per_token(lambda n: small_vocabulary.chunked(n, **settings).peak, 1024, 2048)
    kept = 4 * (4 * 128 + 4 * 128 + 4 * 4 + 2 * 4 * 64)
    assert kept < ours < kept + 4 * (3 * 128 + 2 * 32) + 2 * 4 * 64 + 64


def test_what_waits_outside_is_what_is_kept(small_vocabulary: Any) -> None:
    meter = small_vocabulary.chunked(1024, **FILES)
    kept = 4 * (4 * 128 + 4 * 128 + 4 * 4 + 2 * 4 * 64)
    assert meter.host_peak == 1024 * (kept + 2 * 4 * 64)
    assert meter.host_current == 0


@pytest.mark.parametrize("order", ["query", "key"])
def test_nothing_is_left_when_the_step_is_over(small_vocabulary: Any, order: str) -> None:
    """Without the garbage collector: what waits for it is memory that is missing."""
    import gc

    gc.collect()
    gc.disable()
    try:
        meter = small_vocabulary.chunked(600, **FILES | {"order": order})
        assert meter.current < 100_000
    finally:
        gc.enable()
