"""The main job: train a small decoder on Python's own library, then let every plugin work on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from core.catalogue import not_installed
from core.contributions import Row, Step
from core.disk import replace_file
from core.engines import Sampling, generate
from core.hooks import Hooks
from core.plugins import blame
from core.recipes.report import plot_losses, print_rows
from core.recipes.tokens import Data
from core.recipes.train import train_model
from core.recipes.trigram import Trigram

if TYPE_CHECKING:
    from core.run import Run

PROMPT = "def __init__(self, "


@dataclass
class Tour:
    """What the steps of plugins work on.

    Attributes:
        model: the trained model, in memory; a step that changes it works on a copy.
        data: tokenizer, training and held-out sequences.
        folder: the run's folder; ``model`` in it is the Hugging Face export.
        metrics: figures of the training, such as ``held_out_loss``.
    """

    model: nn.Module
    data: Data
    folder: Path
    metrics: Mapping[str, Any] = field(default_factory=dict)


def quickstart(run: Run) -> Mapping[str, Any]:
    """Run the quickstart; a step that fails, fails the run."""
    trained = train_model(run)
    tour = Tour(trained.model, trained.data, run.folder, trained.metrics)
    trigram = Trigram(tour.data.training, len(tour.data.tokenizer)).loss(tour.data.held_out)
    loss = float(tour.metrics["held_out_loss"])
    rows = [
        (
            "core",
            Row(
                what="held-out loss, nats per token",
                ours=f"{loss:.3f}",
                plain=f"{trigram:.3f}",
                note="plain way: trigram on the same text",
            ),
        )
    ]
    rows.append(("core", _checkpoint_row(run)))
    rows.append(("core", _completion_row(run, tour)))
    steps = [c for c in run.plugins.collect(Hooks.core_recipes) if _is_ours(c.value)]
    for found in sorted(steps, key=lambda c: (getattr(c.value, "order", 0), c.plugin)):
        assert isinstance(found.value, Step)
        run.tell(f"{found.plugin}: {found.value.summary}")
        with blame(found.plugin, f"step {found.value.name!r}"):
            rows += [(found.plugin, row) for row in found.value.main(run, tour)]
    for package in not_installed("quickstart", run.plugins):
        run.tell(f"skipped: {package.summary} (install {package.name} to add it)")
    if run.is_main:
        plot_losses(run.folder, {"trigram": trigram})
        print_rows("quickstart", rows)
        _write_summary(run.folder, rows)
    return {**tour.metrics, "trigram_loss": trigram, "beats_trigram": loss < trigram}


def _is_ours(value: object) -> bool:
    return isinstance(value, Step) and value.recipe == "quickstart"


def _checkpoint_row(run: Run) -> Row:
    from core.checkpoints.layout import newest_valid

    path, manifest, _ = newest_valid(run.checkpoints.directory)
    size = sum(manifest.files.values()) / 2**20
    note = f"{size:.1f} MiB in {manifest.format}"
    return Row(what="newest valid checkpoint", ours=path.name, note=note)


def _completion_row(run: Run, tour: Tour) -> Row:
    tokenizer: Any = tour.data.tokenizer
    engine = run.engine(tour.model)
    try:
        sampling = Sampling(max_new_tokens=24)
        (answer,) = generate(engine, [tokenizer(PROMPT)["input_ids"]], sampling)
    finally:
        engine.close()
    text = tokenizer.decode(answer.ids)
    return Row(what=f"completion of {PROMPT!r}", ours=repr(text), note="greedy")


def _write_summary(folder: Path, rows: list[tuple[str, Row]]) -> None:
    lines = [{"by": by, **vars(row)} for by, row in rows]
    replace_file(folder / "summary.json", (json.dumps(lines, indent=2) + "\n").encode())
