"""``core bench fastpersist``: the benchmark as readings, with a chart beside the run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from core import Reading
from core.disk import nearest_existing, replace_file
from core_fastpersist.bench import ours, peers
from core_fastpersist.bench.report import Report, plot, run as measure

if TYPE_CHECKING:
    from core import Run

SIZE = 256 * 2**20
REPEATS = 4
_KINDS = {"saves": "durable save", "loads": "cold load"}


def readings(run: Run, size: int = SIZE, repeats: int = REPEATS) -> Iterator[Reading]:
    """Measure on the disk of the run's folder; ratios are those of speeds."""
    with tempfile.TemporaryDirectory(dir=nearest_existing(run.folder)) as name:
        report = measure(Path(name), size, repeats, tell=run.tell)
    yield Reading(
        name="state",
        status="ok",
        value=report.conditions["bytes"] / 2**20,
        unit="MiB",
        limit=f"float32; median of {repeats} interleaved repetitions, an fsync in every save",
    )
    for kind, plain in (("saves", peers.TORCH_SAVE), ("loads", peers.TORCH_LOAD)):
        for row in report.as_json()[kind]:
            yield Reading(
                name=f"{_KINDS[kind]}: {row['method']}",
                status="ok",
                value=row["x_torch"],
                unit="x",
                limit=f"of {plain}; {_figures(row)}",
            )
    yield from _files(report, run.folder)


def _figures(row: dict[str, float]) -> str:
    text = f"{row['gb_per_s']:.2f} GB/s, {row['cpu_s_per_gb']:.2f} cpu-s/GB"
    return text + (f", {row['of_raw']:.2f} of the raw device" if "of_raw" in row else "")


def _files(report: Report, folder: Path) -> Iterator[Reading]:
    """Leave the report and its chart in the run's folder."""
    text = json.dumps(report.as_json(), indent=1) + "\n"
    replace_file(folder / f"{ours.NAME}-speed.json", text.encode())
    yield Reading(name="report", status="ok", value=str(folder / f"{ours.NAME}-speed.json"))
    if find_spec("matplotlib") is None:
        advice = "pip install matplotlib"
        yield Reading(name="chart", status="skip", value="needs matplotlib", advice=advice)
        return
    chart = folder / f"{ours.NAME}-speed.png"
    plot(report, chart)
    yield Reading(name="chart", status="ok", value=str(chart))
