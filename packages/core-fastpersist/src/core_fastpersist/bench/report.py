"""A whole benchmark: saves and cold loads, as a table, as JSON and as a bar chart."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.errors import CoreError
from core_fastpersist.bench import ours, peers
from core_fastpersist.bench.measuring import Figures, Tell, interleave, require_room, timed
from core_fastpersist.bench.raw import raw_device
from core_fastpersist.bench.state import make_state, total

_PACKAGES = ("torch", "safetensors", "numpy", "xxhash")
_OTHERS, _OURS, _RAW = "#b8c0cc", "#2f6db3", "#c98a2b"


@dataclass(frozen=True)
class Report:
    """What was measured, and where.

    Args:
        conditions: what the figures depend on.
        raw: name of the raw device among the saves.
        saves: figures of each way to save.
        loads: figures of each way to load, with a cold page cache.
    """

    conditions: Mapping[str, Any]
    raw: str
    saves: Mapping[str, Figures]
    loads: Mapping[str, Figures]

    def as_json(self) -> dict[str, Any]:
        """JSON object."""
        return {
            "conditions": dict(self.conditions),
            "saves": self._rows(self.saves, peers.TORCH_SAVE),
            "loads": self._rows(self.loads, peers.TORCH_LOAD),
        }

    def tables(self) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
        """Head and rows of the two tables, fastest first."""
        found = []
        for what, kind in (("SAVE", "saves"), ("LOAD, COLD", "loads")):
            rows = self.as_json()[kind]
            numbers = list(rows[0])[1:-1]
            head = (what, *(name.replace("_", " ").upper() for name in numbers))
            cells = [(row["method"], *(f"{row[name]:.2f}" for name in numbers)) for row in rows]
            found.append((head, cells))
        return found

    def _rows(self, figures: Mapping[str, Figures], plain: str) -> list[dict[str, Any]]:
        rows = []
        for name, found in figures.items():
            row: dict[str, Any] = {
                "method": name,
                "gb_per_s": found.speed,
                "best_gb_per_s": found.best,
                "cpu_s_per_gb": found.cpu,
                "x_torch": found.faster_than(figures[plain]),
                "x_less_cpu": figures[plain].cpu / max(found.cpu, 1e-9),
            }
            if self.raw in figures:
                row["of_raw"] = found.faster_than(figures[self.raw])
            row["seconds"] = [cost.seconds for cost in found.costs]
            rows.append(row)
        return sorted(rows, key=lambda row: -float(row["gb_per_s"]))


def run(
    folder: Path, size: int, repeats: int, *, seed: int = 0, tell: Tell = lambda text: None
) -> Report:
    """Measure everything on the disk of ``folder``.

    Args:
        folder: existing folder; what is written there is removed.
        size: bytes of the state.
        repeats: interleaved repetitions.
        seed: of the state, and of the order of the methods.
        tell: is told what runs.

    Raises:
        CheckpointError: where there is no direct I/O, or no room.
    """
    state = make_state(size, seed)
    size = total(state)
    raw, write_raw = raw_device(folder, size)
    saves = {**peers.saves(state), **ours.saves(state), raw: write_raw}
    require_room(folder, size, [*peers.loads(), *ours.loads(state)])
    saved = interleave(saves, size, folder, repeats, seed=seed, tell=tell)
    loads = {**peers.loads(), **ours.loads(state)}
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as name:
        files: dict[str, Path] = {}
        for index, how in enumerate({how for how, _ in loads.values()}):
            files[how] = Path(name) / f"{index}.saved"
            timed(saves[how], files[how])
        loaded = interleave(
            {load: work for load, (_, work) in loads.items()},
            size,
            folder,
            repeats,
            seed=seed,
            before={load: files[how] for load, (how, _) in loads.items()},
            tell=tell,
        )
    return Report(_conditions(folder, size, repeats), raw, saved, loaded)


def plot(report: Report, path: Path) -> None:
    """Draw both kinds as bars, with processor seconds beside them.

    Raises:
        CoreError: where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise CoreError("no chart without matplotlib", fix="pip install matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = {"durable save": report.saves, "load, page cache cold": report.loads}
    heights = [len(figures) for figures in kinds.values()]
    figure = Figure(figsize=(9, 1.6 + 0.42 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(kinds), 1, height_ratios=heights)
    for axis, (title, figures) in zip(axes, kinds.items(), strict=True):
        ranked = sorted(figures.items(), key=lambda pair: pair[1].speed)
        names = [name for name, _ in ranked]
        speeds = [found.speed for _, found in ranked]
        bars = axis.barh(names, speeds, color=[_colour(name, report.raw) for name in names])
        axis.bar_label(bars, [f"{f.speed:.2f}, {f.cpu:.2f} cpu-s/GB" for _, f in ranked], padding=4)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlim(0, max(speeds) * 1.35)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(f"GB/s, median of {report.conditions['repeats']} interleaved repetitions")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _colour(name: str, raw: str) -> str:
    if name == raw:
        return _RAW
    return _OURS if name.startswith(ours.NAME) else _OTHERS


def _conditions(folder: Path, size: int, repeats: int) -> dict[str, Any]:
    return {
        "bytes": size,
        "repeats": repeats,
        "folder": str(folder),
        "file system": _file_system(folder),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "processors": os.cpu_count(),
        "load average": round(os.getloadavg()[0], 2),
    }


def _file_system(folder: Path) -> str:
    """Type of the file system, as the longest mount point above the folder tells."""
    mounts = Path("/proc/self/mounts")
    if not mounts.is_file():
        return "unknown"
    found = [line.split()[1:3] for line in mounts.read_text(encoding="utf-8").splitlines()]
    above = [(len(point), kind) for point, kind in found if folder.resolve().is_relative_to(point)]
    return max(above)[1] if above else "unknown"
