"""Pictures of a comparison, all in one style."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import CoreError
from core_splitfuse.benchmarking.comparison import Comparison, Run
from core_splitfuse.benchmarking.figures import token_gaps

_COLORS = ("#2f6db3", "#c98a2b", "#7a8794", "#5a9a68", "#a8527a", "#6d5fb0", "#3d3f45")
_WIDTH, _HEIGHT, _PANEL, _DPI = 8.6, 4.2, 1.5, 144
Draw = Callable[[Any], None]


def plot(found: Comparison, folder: Path, suffix: str = "png") -> list[Path]:
    """Draw everything that a comparison has figures for.

    Args:
        found: what was measured.
        folder: for the pictures; made if needed.
        suffix: ``png`` or ``svg``.

    Returns:
        The pictures.

    Raises:
        CoreError: where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise CoreError("no pictures without matplotlib", fix="pip install core-splitfuse[bench]")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {folder / f"{name}.{suffix}": what for name, what in pictures(found).items()}
    for path, (panels, draw) in chosen.items():
        _draw(path, panels, draw)
    return list(chosen)


def pictures(found: Comparison) -> dict[str, tuple[int, Draw]]:
    """What can be drawn: file names with the number of panels and what draws them."""
    chosen: dict[str, tuple[int, Draw]] = {}
    closed = [run for run in found.runs if run.clients]
    if closed:
        chosen["latency-throughput"] = 1, lambda axes: latency_throughput(axes, found)
        chosen["effective-clients"] = (
            len(found.rates),
            lambda panels: effective_by_clients(panels, found),
        )
    most = max(closed, key=lambda run: run.clients).load if closed else None
    for load in found.loads:
        if load != most and any(run.load == load for run in closed):
            continue
        for name, draw in _BY_LOAD.items():
            panels = len(found.peers(load)) if draw is gaps_over_time else 1
            chosen[f"{name}-{load.replace(' ', '-')}"] = panels, _under(draw, found, load)
    return chosen


def _under(draw: Callable[[Any, Comparison, str], None], found: Comparison, load: str) -> Draw:
    return lambda axes: draw(axes, found, load)


def latency_throughput(axes: Any, found: Comparison) -> None:
    """Mean latency over throughput, a point for each number of clients."""
    for name, color in _colors(found).items():
        points = sorted((r.clients, r.load) for r in found.runs if r.peer == name and r.clients)
        pairs = list(dict.fromkeys(points))
        latency = [found.median(load, name).latency for _, load in pairs]
        rate = [count / late for (count, _), late in zip(pairs, latency, strict=True)]
        axes.plot(rate, latency, "o-", color=color, label=name, markersize=4)
    axes.set(xlabel="clients / mean latency, queries a second", ylabel="mean latency, s")
    axes.set(xlim=(0, None), ylim=(0, None))


def effective_by_clients(panels: Any, found: Comparison) -> None:
    """Effective throughput over clients, a panel for each rate that is promised."""
    for index, (axes, rate) in enumerate(zip(panels, found.rates, strict=True)):
        for name, color in _colors(found).items():
            points = sorted(
                {(r.clients, r.load) for r in found.runs if r.peer == name and r.clients}
            )
            kept = [found.median(load, name).effective[index] for _, load in points]
            axes.plot([c for c, _ in points], kept, "o-", color=color, label=name, markersize=3)
        axes.set(ylim=(0, None), ylabel=f"at {rate:g} tokens/s")
    panels[-1].set(xlabel="clients")
    panels[0].set_title("effective queries a second", fontsize=10)


def effective_bars(axes: Any, found: Comparison, load: str) -> None:
    """Effective throughput of each peer, a group of bars for each rate."""
    peers = found.peers(load)
    width = 0.8 / max(1, len(peers))
    for place, (name, color) in enumerate(_colors(found, peers).items()):
        kept = found.median(load, name).effective
        where = np.arange(len(kept)) + (place - (len(peers) - 1) / 2) * width
        axes.bar(where, kept, width * 0.9, color=color, label=name)
    axes.set_xticks(range(len(found.rates)), [f"{rate:g} tokens/s" for rate in found.rates])
    axes.set(xlabel="promised to readers", ylabel="effective queries a second")


def token_latency(axes: Any, found: Comparison, load: str) -> None:
    """Share of token gaps that is longer than so many seconds."""
    for name, color in _colors(found, found.peers(load)).items():
        runs = _runs(found, load, name)
        gaps = np.sort([gap for run in runs for gap in token_gaps(run.records)])
        longer = 1 - np.arange(len(gaps)) / len(gaps)
        axes.step(gaps, longer, color=color, label=name, where="post")
    axes.set(xscale="log", yscale="log", xlabel="gap between tokens, s", ylabel="share above")
    for share, text in ((0.5, "p50"), (0.05, "p95"), (0.01, "p99")):
        axes.axhline(share, color="#d5d9de", linewidth=0.8, zorder=0)
        axes.annotate(text, (1, share), xycoords=("axes fraction", "data"), fontsize=8)


def gaps_over_time(panels: Any, found: Comparison, load: str) -> None:
    """Every gap between tokens at the moment it ended, in the first round; a panel for each peer."""
    colors = _colors(found, found.peers(load))
    for axes, (name, color) in zip(panels, colors.items(), strict=True):
        records = _runs(found, load, name)[0].records
        when = [second for record in records for second in record.times[1:]]
        gaps = [gap for record in records for gap in record.gaps]
        axes.plot(when, gaps, ".", color=color, label=name, markersize=3)
        axes.set(yscale="log", ylabel="gap, s")
    panels[-1].set(xlabel="second of the run")


_BY_LOAD: Mapping[str, Callable[[Any, Comparison, str], None]] = {
    "token-latency": token_latency,
    "gaps-over-time": gaps_over_time,
    "effective": effective_bars,
}


def _draw(path: Path, panels: int, draw: Draw) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(_WIDTH, max(_HEIGHT, _PANEL * panels)), layout="constrained")
    FigureCanvasAgg(figure)
    every: list[Any] = list(
        figure.subplots(panels, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    )
    draw(every if panels > 1 else every[0])
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#eceff2", linewidth=0.8)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(NullLocator())
    _legend(figure, every)
    # Without the date, equal figures are equal files.
    figure.savefig(path, dpi=_DPI, metadata={"Date": None} if path.suffix == ".svg" else None)


def _legend(figure: Any, every: Sequence[Any]) -> None:
    """One legend beside all panels, each name once."""
    named = {
        name: line
        for axes in every
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(), named.keys(), loc="outside right upper", frameon=False, fontsize=8
    )


def _colors(found: Comparison, peers: Sequence[str] | None = None) -> dict[str, str]:
    """Colors by peer: the same one in all pictures of a comparison."""
    everybody = list(dict.fromkeys(run.peer for run in found.runs))
    chosen = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(everybody)}
    return {name: chosen[name] for name in (everybody if peers is None else peers)}


def _runs(found: Comparison, load: str, peer: str) -> list[Run]:
    return [run for run in found.runs if (run.load, run.peer) == (load, peer)]
