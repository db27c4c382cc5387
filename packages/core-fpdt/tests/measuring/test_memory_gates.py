"""What one more token costs on the device, against training as it is done elsewhere."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from core_fpdt.measuring import per_token

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
FILES: dict[str, Any] = {"chunk_tokens": 128, "offload": "file", "loss_chunk_bytes": 2**22}
SIMULATED = FILES | {"offload": "host", "delay": 1e-6}
KEPT = 4 * (4 * 128 + 4 * 128 + 4 * 4 + 2 * 4 * 64)
"""Bytes of a token in four layers: inputs, attention outputs, lse, keys and values; float32."""
SUMS = 4 * 2 * 64
"""Bytes of the gradients of keys and values that add up in one layer."""
STREAM = 4 * (3 * 128 + 2 * 32) + 64
"""Three residual streams, rotary tables, ids."""


@pytest.mark.parametrize("settings", [FILES, SIMULATED], ids=["files", "simulated device"])
def test_a_token_costs_a_sixteenth_of_plain_training(steps: Any, settings: dict[str, Any]) -> None:
    """And a sixth of gradient checkpointing, with the vocabulary of 32,000 that both have."""
    model = steps(**WIDE, vocab_size=32000)
    ours = per_token(lambda n: model.chunked(n, **settings).peak, 512, 1024)
    plain = per_token(lambda n: model.plain(n).peak, 128, 256)
    checkpointed = per_token(lambda n: model.checkpointed(n).peak, 128, 256)
    assert plain / ours >= 16
    assert checkpointed / ours >= 6
    assert ours <= STREAM


def test_layers_alone_cost_less_too(steps: Any) -> None:
    """It is not the vocabulary that makes the difference: here it is small."""
    model = steps(**WIDE, vocab_size=500)
    settings = FILES | {"loss_chunk_bytes": 2**19}
    ours = per_token(lambda n: model.chunked(n, **settings).peak, 512, 1024)
    plain = per_token(lambda n: model.plain(n).peak, 256, 512)
    checkpointed = per_token(lambda n: model.checkpointed(n).peak, 256, 512)
    assert plain / ours >= 16
    assert checkpointed / ours >= 6


def test_chunks_that_are_not_moved_cost_what_is_kept(steps: Any) -> None:
    model = steps(**WIDE, vocab_size=500)
    settings = FILES | {"offload": "none", "loss_chunk_bytes": 2**19}
    ours = per_token(lambda n: model.chunked(n, **settings).peak, 512, 1024)
    assert KEPT < ours <= KEPT + STREAM + SUMS


def test_what_waits_outside_is_what_is_kept(steps: Any) -> None:
    meter = steps(**WIDE, vocab_size=500).chunked(512, **FILES)
    assert meter.host_peak == 512 * (KEPT + SUMS)
    assert meter.host_current == 0


@pytest.mark.parametrize("order", ["query", "key"])
@pytest.mark.parametrize("keys", [True, False])
def test_nothing_is_left_when_the_step_is_over(steps: Any, order: str, keys: bool) -> None:
    """Without the garbage collector: what waits for it is memory that is missing meanwhile."""
    model = steps(**WIDE, vocab_size=500)
    gc.collect()
    gc.disable()
    try:
        meter = model.chunked(300, **FILES | {"order": order, "keep_keys": keys})
        assert meter.current < 1000
    finally:
        gc.enable()
