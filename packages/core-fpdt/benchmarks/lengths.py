"""The longest sequence that a training step takes within one budget of memory.

Every length is tried in a fresh process, whose anonymous resident memory is polled: what lies in files
is not counted, as the kernel can write it out. The search doubles until a step does not fit, and halves
the gap until it is a part of the length that is small enough::

    python packages/core-fpdt/benchmarks/lengths.py --budget 1GiB --json lengths.json
    python packages/core-fpdt/benchmarks/lengths.py --way plain --way "chunks in files" --plot lengths.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from trials import MIB, WAYS, Result, Subject, measure

from core.cli.table import echo_table
from core_fpdt.planning.units import parse_bytes, parse_tokens

OURS = "chunks in files"
GATES = {"plain": 16.0, "checkpointing": 4.0}
"""How many times longer ours has to be."""


def longest(
    way: str, subject: Subject, budget: int, *, first: int, most: int, precision: float
) -> tuple[int, dict[int, Result]]:
    """Search the longest sequence that fits.

    Args:
        way: how to train.
        subject: the model.
        budget: bytes that a step may add.
        first: tokens to begin with.
        most: tokens to stop at.
        precision: the gap that may be left, as a share of the length.

    Returns:
        Tokens, 0 if not even ``first`` fit, and every result by tokens.
    """
    tried: dict[int, Result] = {}

    def fits(tokens: int) -> bool:
        tried[tokens] = measure(way, tokens, subject, budget=budget)
        told = "fits" if tried[tokens].fits else "does not fit"
        click.echo(
            f"{way}: {tokens:,} tokens: {told}, {tried[tokens].growth / MIB:,.0f} MiB", err=True
        )
        return tried[tokens].fits

    low, high = 0, first
    while high <= most and fits(high):
        low, high = high, high * 2
    if high > most:
        return low, tried
    while low and high - low > max(64, precision * low):
        middle = (low + high) // 2 // 64 * 64
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, tried


@click.command()
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Repeatable.")
@click.option("--budget", default="1GiB", show_default=True, help="Bytes that a step may add.")
@click.option("--first", default="512", show_default=True, help="Tokens to begin with.")
@click.option("--most", default="512K", show_default=True, help="Tokens to stop at.")
@click.option("--precision", default=0.125, show_default=True, help="Share of a length left open.")
@click.option("--hidden", default=256, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--vocabulary", default=32000, show_default=True)
@click.option("--chunk", default=1024, show_default=True, help="Tokens in a chunk of ours.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the results there.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw them there.")
def main(
    ways: tuple[str, ...],
    budget: str,
    first: str,
    most: str,
    precision: float,
    hidden: int,
    layers: int,
    vocabulary: int,
    chunk: int,
    file: Path | None,
    picture: Path | None,
) -> None:
    """Search the longest sequences; the exit status is 1 when ours is not long enough."""
    subject = Subject(hidden=hidden, layers=layers, vocabulary=vocabulary, chunk=chunk)
    found: dict[str, int] = {}
    results: dict[str, dict[int, Any]] = {}
    for way in ways or tuple(WAYS):
        limits = {"first": parse_tokens(first), "most": parse_tokens(most)}
        found[way], tried = longest(
            way, subject, parse_bytes(budget), precision=precision, **limits
        )
        results[way] = {tokens: asdict(result) for tokens, result in sorted(tried.items())}
    ours = found.get(OURS, 0)
    rows = [
        (f"{tokens:,}", f"{ours / tokens:.1f}" if ours and tokens else "-", way)
        for way, tokens in found.items()
    ]
    echo_table(("TOKENS", "OURS / THIS", f"WAY, within {budget}"), rows)
    if file is not None:
        about = {"subject": asdict(subject), "budget": parse_bytes(budget), "precision": precision}
        text = json.dumps({**about, "longest": found, "tried": results}, indent=2)
        file.write_text(text, encoding="utf-8")
    if picture is not None:
        draw(found, budget, picture)
    judged = {way: ours / found[way] for way in GATES if found.get(way) and OURS in found}
    sys.exit(any(ratio < GATES[way] for way, ratio in judged.items()))


def draw(found: Mapping[str, int], budget: str, path: Path) -> None:
    """Draw a bar for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 0.6 + 0.5 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    names = list(found)[::-1]
    colors = ["#2f6db3" if name == OURS else "#7a8794" for name in names]
    bars = axes.barh(names, [found[name] for name in names], color=colors)
    axes.bar_label(bars, [f"{found[name]:,}" for name in names], padding=3, fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(f"tokens of the longest sequence within {budget}")
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=144, metadata=metadata)


if __name__ == "__main__":
    main()
