"""What a run comes to: latencies of tokens and requests, and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from core_splitfuse.benchmarking.driver import Record
from core_splitfuse.benchmarking.effective import (
    RATES,
    Promise,
    duration,
    effective_throughput,
    throughput,
)


@dataclass(frozen=True)
class Figures:
    """Figures of one run, or the medians of several; seconds, and per second.

    Args:
        gap50: median gap between tokens; ``gap90``, ``gap95``, ``gap99`` are its percentiles.
        gap_max: longest gap.
        first50: median time to the first token; ``first95`` its 95th percentile.
        latency: mean time to the last token.
        tokens: generated tokens a second.
        queries: queries a second, first arrival to last token.
        effective: queries a second that kept the promise of each rate.
        effective_in_sum: the same by the cumulative reading.
    """

    gap50: float
    gap90: float
    gap95: float
    gap99: float
    gap_max: float
    first50: float
    first95: float
    latency: float
    tokens: float
    queries: float
    effective: tuple[float, ...]
    effective_in_sum: tuple[float, ...]


def figures(records: Sequence[Record], rates: Sequence[float] = RATES) -> Figures:
    """Work out the figures of a run."""
    gaps, firsts = token_gaps(records), [r.first for r in records]
    gap50, gap90, gap95, gap99, longest = np.percentile(gaps, (50, 90, 95, 99, 100)).tolist()
    first50, first95 = np.percentile(firsts, (50, 95)).tolist()
    promises = [Promise(rate) for rate in rates]
    return Figures(
        gap50=gap50,
        gap90=gap90,
        gap95=gap95,
        gap99=gap99,
        gap_max=longest,
        first50=first50,
        first95=first95,
        latency=float(np.mean([r.latency for r in records])),
        tokens=sum(len(r.times) for r in records) / duration(records),
        queries=throughput(records),
        effective=tuple(effective_throughput(records, p) for p in promises),
        effective_in_sum=tuple(effective_throughput(records, p, in_sum=True) for p in promises),
    )


def token_gaps(records: Sequence[Record]) -> list[float]:
    """Gaps between tokens as the paper counts them, in seconds.

    Neither the first nor the last token of a request counts, nor do the first and the last request,
    as long as anything else is left.
    """
    kept = records[1:-1] if len(records) > 2 else records
    return [gap for record in kept for gap in record.gaps[:-1]]


def median(runs: Sequence[Figures]) -> Figures:
    """Median of each figure over runs of the same load."""
    names = [field.name for field in fields(Figures)]
    middle: dict[str, Any] = {
        name: np.median([getattr(run, name) for run in runs], axis=0).tolist() for name in names
    }
    for name in ("effective", "effective_in_sum"):
        middle[name] = tuple(middle[name])
    return Figures(**middle)
