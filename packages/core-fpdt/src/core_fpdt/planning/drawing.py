"""A picture of what longer sequences take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.errors import CoreError
from core_fpdt.planning.memory import Parts, memory
from core_fpdt.planning.plan import Plan
from core_fpdt.planning.units import show_tokens

_COLORS = (
    "#2f6db3", "#7aa7d9", "#c98a2b", "#e5c48b", "#5a9a68", "#a3cfae", "#a8527a", "#d7a3bd",
    "#6d5fb0", "#7a8794", "#3d3f45", "#c2c8cf",
)  # fmt: skip
_POINTS = 48
_GIB = 2**30


def draw(found: Plan, path: Path) -> None:
    """Draw bytes by part over the length of the sequence, with what there is.

    Args:
        found: its sequence is marked; everything else stays as it is.
        path: of the picture, ``.png`` or ``.svg``.

    Raises:
        CoreError: without matplotlib, for another suffix, or where nothing can be written.
    """
    if find_spec("matplotlib") is None:
        raise CoreError("no pictures without matplotlib", fix="pip install core-fpdt[plot]")
    if path.suffix not in (".png", ".svg"):
        raise CoreError(f"no picture can be drawn into {path}", fix="name a .png or .svg file")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Any] = list(figure.subplots(2, 1, sharex=True))
    lengths = _lengths(found)
    taken = [memory(replace(found.job, sequence=length)) for length in lengths]
    _stack(panels[0], lengths, [each.device for each in taken], found.job.hardware.memory)
    _stack(panels[1], lengths, [each.host for each in taken], found.host_limit)
    panels[0].set_ylabel("GiB on each device")
    panels[1].set_ylabel("GiB of the host, each rank")
    panels[1].set_xlabel("tokens of a sequence")
    for axes in panels:
        _finish(axes, found)
    metadata = {"Date": None} if path.suffix == ".svg" else None  # equal plans are equal files
    try:
        figure.savefig(path, dpi=144, metadata=metadata)
    except OSError as error:
        raise CoreError(f"cannot write {path}", why=error.strerror or str(error)) from None


def _lengths(found: Plan) -> list[int]:
    """Lengths in whole chunks, in even steps of their logarithm, past both that is asked for."""
    chunk = found.job.chunk
    top = max(found.longest, found.job.sequence, 2 * chunk) * 1.5 / chunk
    steps = [top ** (i / (_POINTS - 1)) for i in range(_POINTS)]
    return [chunk * count for count in sorted({math.ceil(step) for step in steps})]


def _stack(axes: Any, lengths: Sequence[int], parts: Sequence[Parts], limit: float) -> None:
    names = list(dict.fromkeys(name for each in parts for name in each))
    layers = [[each.get(name, 0.0) / _GIB for each in parts] for name in names]
    if names:
        axes.stackplot(lengths, layers, labels=names, colors=_COLORS, linewidth=0)
    if limit < math.inf:
        axes.axhline(limit / _GIB, color="#b03030", linewidth=1.2, label="limit")


def _finish(axes: Any, found: Plan) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    label = f"{show_tokens(found.job.sequence)} tokens"
    axes.axvline(found.job.sequence, color="#3d3f45", linewidth=0.9, linestyle=":", label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show_tokens(int(value))))
    axes.set_ylim(0, None)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
