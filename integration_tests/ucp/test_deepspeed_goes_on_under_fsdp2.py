"""A run of DeepSpeed goes on under FSDP2 on other numbers of ranks, and back under DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ucp.deepspeed_cases import Case
from ucp.fsdp2_runs import go_on

from core.storage import new_folder
from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.sources.registry import open_checkpoint
from core_ucp.targets.deepspeed import DeepSpeedOptions, build

# A rate that stays as it is after two steps, so that FSDP2 needs no schedule of DeepSpeed's.
_CONSTANT = {
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": 1e-2}}
}
SINGLE = Case("goes-on-fp32", world=4, precision="fp32", groups=2, settings=_CONSTANT)
HALF = SINGLE.but("goes-on-bf16", precision="bf16")
STEPS = 3


def size_of(saved: Any) -> int:
    return sum(
        tensor.nbytes for key, tensor in saved.truth().items() if key[:5] in ("model", "optim")
    )


@pytest.mark.parametrize(
    ("case", "world"),
    [
        (SINGLE, 2),
        pytest.param(SINGLE, 3, marks=pytest.mark.nightly),
        pytest.param(SINGLE, 1, marks=pytest.mark.nightly),
        pytest.param(HALF, 2, marks=pytest.mark.nightly),
        (HALF, 3),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_on_other_ranks_and_back(case: Case, world: int, lab: Any, tmp_path: Path) -> None:
    saved = lab.saved(case)
    there = go_on(case, saved.folder, tmp_path / "there", world=world, steps=STEPS)
    assert there.losses == pytest.approx(saved.facts["continued"], abs=1e-3)
    # Every rank reads its own part, and all of them together the state once; only what every rank
    # needs as a whole (buffers, and the counters of steps) is read by each.
    state = sum(atom.nbytes for atom in open_checkpoint(saved.folder).atoms.values())
    shared = sum(
        atom.nbytes
        for key, atom in open_checkpoint(saved.folder).atoms.items()
        if key.endswith((".step", "offset"))
    )
    assert sum(there.bytes_read) == state + (world - 1) * shared
    view = open_checkpoint(there.saved)
    options = DeepSpeedOptions(stage=3, world_size=2, dtype=case.precision, buffers=("offset",))
    with new_folder(tmp_path / "back") as folder:
        execute(plan(view, build(view, options)), folder)
    back = case.but("goes-on-back", stage=3, world=2)
    undisturbed = lab.resume(case, saved.folder, 2 * STEPS).losses
    resumed = lab.resume(back, tmp_path / "back", STEPS)
    assert resumed.losses == pytest.approx(undisturbed[STEPS:], abs=1e-3)
