"""DeepSpeed goes on from files that were made for it, from runs of every other shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ucp.deepspeed_changes import SOURCES, Change, convert, require_state
from ucp.deepspeed_runs import Lab

pytest.importorskip("deepspeed")

SUB_GROUPS = {"sub_group_size": 3000}

QUICK = (
    Change("zero1-dp4", 1, 4, same=True),
    Change("zero1-dp4", 3, 2),
    Change("zero1-dp4", 2, 3),
    Change("zero1-dp4-fp16", 3, 2),
    Change("zero3-frozen", 3, 3, same=True),
    Change("zero3-frozen", 1, 2),
    Change("zero3-dp2", 1, 4),
    Change("zero2-round-robin", 1, 2),
    Change("zero1-dp2", 2, 3, zero={"round_robin_gradients": True}),
    Change("zero1-dp2", 0, 2),
    Change("stage0-fp32", 3, 2, zero=SUB_GROUPS),
)
"""What the default run proves."""

_SAME = (
    ("zero1-dp2", 1, 2),
    ("zero1-dp4-fp16", 1, 4),
    ("zero2-round-robin", 2, 3),
    ("zero3-dp2", 3, 2),
    ("stage0-fp32", 0, 2),
    ("zero1-aligned", 1, 3),
    ("zero1-sgd", 1, 2),
    ("zero1-gpt2", 1, 2),
    ("zero2-frozen", 2, 3),
    ("zero2-dp4-fp16", 2, 4),
    ("zero3-dp4-fp32", 3, 4),
    ("zero3-fp16", 3, 3),
    ("zero3-sgd", 3, 2),
    ("stage0-bf16", 0, 2),
    ("stage0-fp16", 0, 2),
    ("stage0-fp32-empty", 0, 2),
    ("stage0-sgd", 0, 2),
)
_OTHERS = (
    "zero1-dp2", "zero1-dp4-fp16", "zero1-tied-frozen", "zero1-sgd", "zero1-aligned", "zero1-fp32",
    "zero2-round-robin", "zero2-frozen", "zero2-dp4-fp16", "zero3-dp2", "zero3-dp4", "zero3-fp16",
    "zero3-sgd", "zero3-frozen", "zero3-llama", "stage0-bf16", "stage0-fp16", "stage0-sgd",
)  # fmt: skip
_TARGETS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (0, 2, {}),
    (1, 3, {"parameter_alignment": True}),
    (2, 4, {"round_robin_gradients": True}),
    (3, 3, SUB_GROUPS),
)
SLOW = (
    *(Change(source, stage, world, same=True) for source, stage, world in _SAME),
    Change("zero1-autotp", 1, 2),
    Change("zero1-autotp-dp2", 3, 3),
    Change("zero3-autotp", 2, 2),
    Change("stage0-autotp", 1, 3),
    *(
        Change(source, stage, world, zero=zero)
        for source in _OTHERS
        for stage, world, zero in _TARGETS
        if SOURCES[source].stage or stage  # the same run is above
        if (source, stage) != ("zero1-fp32", 0)  # has a test of its own
    ),
)
"""What else there is: every kind of source into every stage."""

CHANGES = [
    *(pytest.param(change, id=str(change)) for change in QUICK),
    *(pytest.param(change, id=str(change), marks=pytest.mark.nightly) for change in SLOW),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on(change: Change, lab: Lab, tmp_path: Path) -> None:
    saved = lab.saved(SOURCES[change.source])
    folder = convert(saved, change.options, tmp_path / "made")
    resumed = lab.resume(change.case, folder, steps=3 if change.runs else 0)
    require_state(saved, resumed, halves=True)
    assert resumed.facts["steps_loaded"] == saved.facts["global_steps"]
    assert resumed.facts["loaded"] == {"tokens_seen": saved.facts["global_steps"] * 12}
    if change.same:
        assert resumed.losses == saved.facts["continued"]
        final = resumed.final()
        assert [k for k, tensor in saved.final().items() if not torch.equal(tensor, final[k])] == []
    elif change.runs:
        count = 3 if change.comparable else 1
        expected = pytest.approx(saved.facts["continued"][:count], rel=1e-3)
        assert resumed.losses[:count] == expected
