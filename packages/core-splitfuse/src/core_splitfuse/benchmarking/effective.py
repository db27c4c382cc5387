"""Effective throughput: only answers that a reader would call fluent count.

DeepSpeed-FastGen, arXiv 2401.08671, section 4: the first token comes as fast as 512 prompt tokens a
second allow, and the moving average of the later gaps never falls behind the rate of reading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core_splitfuse.benchmarking.driver import Record

RATES = (2.0, 4.0, 6.0)
"""Tokens a second that the paper promises to readers."""
PROMPT_RATE = 512.0
"""Prompt tokens for which a reader waits one second."""
SPAN = 16


@dataclass(frozen=True)
class Promise:
    """What an answer has to keep to be counted.

    Args:
        rate: tokens a second.
        prompt_rate: prompt tokens a second until the first token.
        span: of the moving average, in tokens.
    """

    rate: float
    prompt_rate: float = PROMPT_RATE
    span: int = SPAN

    def kept(self, record: Record) -> bool:
        """Whether the first token came in time and the average of gaps was always short enough."""
        fluent = moving_average(record.gaps, self.span) < 1 / self.rate
        return self._began_in_time(record) and bool(fluent.all())

    def kept_in_sum(self, record: Record) -> bool:
        """The cumulative reading: token ``i`` comes ``i / rate`` seconds after the first one at most.

        A token that came early makes up for a later one.
        """
        due = np.arange(1, len(record.times)) / self.rate
        since = np.asarray(record.times[1:]) - record.times[0]
        return self._began_in_time(record) and bool((since <= due).all())

    def _began_in_time(self, record: Record) -> bool:
        return record.first <= record.prompt / self.prompt_rate


def moving_average(values: Sequence[float], span: int = SPAN) -> NDArray[np.float64]:
    """Exponential moving average with the weights of what there is, as pandas' ``adjust=True``.

    Returns:
        (values,) float64: average ``t`` weighs value ``i`` with ``(1 - 2 / (span + 1)) ** (t - i)``.

    Example:
        >>> moving_average([1.0, 0.0], span=3).round(4).tolist()
        [1.0, 0.3333]
    """
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    found: list[float] = []
    for value in values:
        total, weight = total * keep + value, weight * keep + 1
        found.append(total / weight)
    return np.asarray(found, np.float64)


def effective_throughput(
    records: Sequence[Record], promise: Promise, *, in_sum: bool = False
) -> float:
    """Queries a second, times the share of answers that kept the promise."""
    judge = promise.kept_in_sum if in_sum else promise.kept
    return throughput(records) * sum(map(judge, records)) / len(records)


def throughput(records: Sequence[Record]) -> float:
    """Queries a second, from the first arrival to the last token."""
    return len(records) / duration(records)


def duration(records: Sequence[Record]) -> float:
    """Seconds from the first arrival to the last token."""
    return max(r.ended for r in records) - min(r.arrived for r in records)
