"""The picture of a comparison: divergence over bits per weight."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, cast

from core_fp6.quality.comparing.results import Comparison, Score

_FAMILIES = {
    "six-bit float": ("#c2410c", "o"),
    "six-bit MX": ("#d9a21b", "D"),
    "other float": ("#7c6f9c", "P"),
    "FP8": ("#0f766e", "s"),
    "integer": ("#2563a8", "^"),
    "NF4": ("#5b7083", "v"),
}
_NEAR, _FAR = 7.0, 70.0
_ROOM = 2.0


def plot(comparison: Comparison, path: Path) -> Path:
    """Draw every variant as a labelled point: bits per weight, and divergence on a log axis.

    Args:
        comparison: of which variants without any divergence are left out.
        path: image to write; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [score for score in comparison.scores if score.kl > 0]
    for family, (colour, marker) in _FAMILIES.items():
        points = [score for score in shown if score.family == family]
        if points:
            axes.scatter(
                [point.bits_per_weight for point in points],
                [point.kl for point in points],
                label=family,
                color=colour,
                marker=marker,
                s=46,
                zorder=3,
            )
    axes.set_yscale("log")
    axes.margins(0.12, 0.1)
    axes.set_xlabel("bits per weight, scales included")
    axes.set_ylabel("divergence from the unquantized model (nats per token)")
    axes.set_title(f"{comparison.model}, {comparison.tokens:,} tokens", loc="left", fontsize=11)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    if shown:
        axes.legend(frameon=False)
        cast(Any, canvas).draw()  # labels are placed by what is drawn
        _label(axes, shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


def _label(axes: Any, scores: list[Score]) -> None:
    """Write names beside the points, each at the nearest place where it covers nothing."""
    places = [axes.transData.transform((s.bits_per_weight, s.kl)) for s in scores]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    frame = axes.get_legend().get_window_extent()
    taken.append((frame.x0, frame.y0, frame.x1, frame.y1))
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent()
    for score, (x, y) in sorted(zip(scores, places, strict=True), key=lambda p: -p[0].kl):
        text = axes.annotate(
            score.variant,
            (score.bits_per_weight, score.kl),
            xytext=(0, 0),
            textcoords="offset pixels",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "#999999", "shrinkB": 4},
        )
        size = text.get_window_extent(renderer)
        box = _free_place(x, y, size.width, size.height, taken, inside)
        text.set_position((box[0] - x, (box[1] + box[3]) / 2 - y))
        taken.append(box)


def _free_place(
    x: float, y: float, width: float, height: float, taken: list[Any], inside: Any
) -> tuple[float, float, float, float]:
    away = sorted(
        product((_NEAR, -_NEAR - width, _FAR, -_FAR - width), range(-120, 121, 6)),
        key=lambda offset: abs(offset[0] + width / 2) + 2 * abs(offset[1]),
    )
    boxes = [
        (x + right, y + up - height / 2, x + right + width, y + up + height / 2)
        for right, up in away
    ]
    free = (
        box
        for box in boxes
        if box[0] >= inside.x0
        and box[2] <= inside.x1
        and not any(_overlap(box, other) for other in taken)
    )
    return next(free, boxes[0])


def _overlap(a: Any, b: Any) -> bool:
    apart = a[2] + _ROOM < b[0] or b[2] + _ROOM < a[0] or a[3] + _ROOM < b[1] or b[3] + _ROOM < a[1]
    return not apart
