"""The quickstart's run resumes on two ranks under FSDP2, and comes back to one process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from core import Row
from core.checkpoints.convert import execute, plan
from core.checkpoints.layout import newest_valid
from core.errors import CheckpointError
from core_ucp.execution.checking import verify
from core_ucp.quickstart.training import Leg, plot, train, train_on_ranks
from core_ucp.sources.registry import open_checkpoint

if TYPE_CHECKING:
    from core import Run
    from core.recipes.quickstart import Tour

STEPS = 6
"""Optimizer steps of each leg."""
TOLERANCE = 1e-3
"""Largest difference of a loss from the undisturbed run, in nats per token."""


def resume_elsewhere(run: Run, tour: Tour) -> Iterator[Row]:
    """Go on from the run's newest checkpoint on two ranks, and then back on one.

    Raises:
        CheckpointError: when a conversion is not exact, or the losses leave the undisturbed curve.
    """
    folder = tour.folder / "elsewhere"
    shutil.rmtree(folder, ignore_errors=True)
    saved, manifest, _ = newest_valid(run.checkpoints.directory)

    def leg(name: str, source: Path, steps: int) -> Leg:
        settings = run.folder / "settings.json"
        return Leg(
            settings, len(tour.data.tokenizer), tour.data.training, source, steps, folder / name
        )

    begin, middle = manifest.step, manifest.step + STEPS
    there, checked = _universal(run, saved, folder / "universal")
    two = train_on_ranks(leg("two-ranks", there, STEPS), 2)
    left = newest_valid(folder / "two-ranks")[0]
    back, _ = _universal(run, left, folder / "universal-back")
    one = train(leg("one-again", back, STEPS))
    undisturbed = train(leg("undisturbed", saved, 2 * STEPS))
    plot(
        tour.folder / "elsewhere.png",
        begin,
        [
            ("one process, undisturbed", begin, undisturbed),
            ("two ranks, FSDP2", begin, two),
            ("one process again", middle, one),
        ],
    )
    apart = max(abs(a - b) for a, b in zip([*two, *one], undisturbed, strict=True))
    if apart > TOLERANCE:
        raise CheckpointError(f"the resumed run is {apart:.2g} nats per token off its curve")
    yield Row(
        what=f"losses after resuming, {STEPS} steps on 2 ranks and {STEPS} back on 1",
        ours=f"within {apart:.1e}",
        plain="0",
        note="nats per token; plain way: never interrupted; see elsewhere.png",
    )
    yield Row(
        what="tensors of the universal folder held against their digests",
        ours=f"{checked} of {checked}",
    )
    shutil.rmtree(folder)


def _universal(run: Run, source: Path, target: Path) -> tuple[Path, int]:
    """Convert a checkpoint and read every byte of the result once more."""
    execute(plan(source, target, "universal", run))
    findings = list(verify(open_checkpoint(target)))
    bad = [found for found in findings if found.status != "ok"]
    if bad:
        raise CheckpointError(f"{target} is not what was saved", why=bad[0].problem)
    return target, len(findings)
