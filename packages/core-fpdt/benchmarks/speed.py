"""CPU time of a training step, against gradient checkpointing at the same length.

Every step runs in a fresh process with one thread, the ways in turn, several rounds; figures are
medians of CPU seconds, and ratios are those of each round::

    python packages/core-fpdt/benchmarks/speed.py --tokens 8K --tokens 16K --json speed.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from trials import WAYS, Result, Subject, measure

from core.cli.table import echo_table
from core_fpdt.planning.units import parse_tokens

BASE = "checkpointing"
OURS = "chunks in files"
GATE = 1.0
"""The most that ours may take of the CPU time of gradient checkpointing."""

Runs = dict[str, list[Result]]


@click.command()
@click.option("--tokens", "lengths", multiple=True, default=["8K"], show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Repeatable.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--hidden", default=256, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--vocabulary", default=32000, show_default=True)
@click.option("--chunk", default=1024, show_default=True, help="Tokens in a chunk of ours.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the results there.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw them there.")
def main(
    lengths: tuple[str, ...],
    ways: tuple[str, ...],
    rounds: int,
    hidden: int,
    layers: int,
    vocabulary: int,
    chunk: int,
    file: Path | None,
    picture: Path | None,
) -> None:
    """Measure steps; the exit status is 1 when ours takes longer than gradient checkpointing."""
    subject = Subject(hidden=hidden, layers=layers, vocabulary=vocabulary, chunk=chunk)
    chosen = ways or (BASE, "checkpointing, chunked loss", "chunks", OURS)
    found = {
        tokens: measured(chosen, tokens, subject, rounds) for tokens in map(parse_tokens, lengths)
    }
    rows = [
        (f"{tokens:,}", f"{seconds(runs[way]):.1f}", shown(ratio(runs, way)), way)
        for tokens, runs in found.items()
        for way in chosen
    ]
    echo_table(("TOKENS", "CPU SECONDS", f"OF {BASE.upper()}", "WAY"), rows)
    if file is not None:
        results = {
            tokens: {way: [asdict(result) for result in runs[way]] for way in chosen}
            for tokens, runs in found.items()
        }
        text = json.dumps({"subject": asdict(subject), "results": results}, indent=2)
        file.write_text(text, encoding="utf-8")
    if picture is not None:
        draw(found, picture)
    judged = [ratio(runs, OURS) for runs in found.values()]
    sys.exit(any(value is not None and value > GATE for value in judged))


def measured(ways: tuple[str, ...], tokens: int, subject: Subject, rounds: int) -> Runs:
    """Measure all ways in turn."""
    runs: Runs = {way: [] for way in ways}
    for number in range(rounds):
        for way in ways:
            runs[way].append(measure(way, tokens, subject))
            told = f"{runs[way][-1].seconds:.1f} s"
            click.echo(f"round {number + 1}: {way}, {tokens:,} tokens: {told}", err=True)
    return runs


def seconds(runs: list[Result]) -> float:
    """Median CPU seconds."""
    return statistics.median(result.seconds for result in runs)


def ratio(runs: Runs, way: str) -> float | None:
    """Median, over rounds, of what a way takes of the CPU time of gradient checkpointing."""
    if BASE not in runs or way not in runs:
        return None
    pairs = zip(runs[way], runs[BASE], strict=True)
    return statistics.median(one.seconds / base.seconds for one, base in pairs)


def shown(value: float | None) -> str:
    """A ratio as text."""
    return "-" if value is None else f"{value:.2f}"


def draw(found: Mapping[int, Runs], path: Path) -> None:
    """Draw CPU seconds over the length, a line for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    lengths = sorted(found)
    for way in found[lengths[0]]:
        axes.plot(lengths, [seconds(found[n][way]) for n in lengths], "o-", label=way)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="CPU seconds of a step")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=144, metadata=metadata)


if __name__ == "__main__":
    main()
