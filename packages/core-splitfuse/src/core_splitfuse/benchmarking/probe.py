"""``core bench splitfuse``: a short measurement on this machine, as readings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from core.contributions import Reading
from core_splitfuse.benchmarking.gates import SATURATED
from core_splitfuse.benchmarking.report import conditions, save
from core_splitfuse.benchmarking.suite import Suite

if TYPE_CHECKING:
    from core.run import Run

_NAMES = ("splitfuse", "prefill first", "transformers CB 128", "generate, batches")
_RATE = 2.0
_FIGURES = {
    "gap95": "95th percentile of the gaps between tokens",
    "gap99": "99th percentile of the gaps between tokens",
    "tokens": "generated tokens a second",
}


def serving(run: Run, suite: Suite | None = None) -> Iterator[Reading]:
    """Poisson arrivals that saturate a CPU core, against the same code unsplit and transformers."""
    suite = suite or Suite(requests=12, rounds=1)
    load = {SATURATED: suite.poisson(_RATE)}
    found = suite.measure(load, _NAMES, run.tell)
    ours, *others = found.peers(SATURATED)
    got = found.median(SATURATED, ours)
    for figure, what in _FIGURES.items():
        yield Reading(
            name=f"{ours}: {what}",
            status="ok",
            value=getattr(got, figure),
            unit="tokens/s" if figure == "tokens" else "s",
            limit=f"{suite.requests} requests at {_RATE:g}/s, processor time",
        )
    for peer in others:
        for figure, what in _FIGURES.items():
            ratio = found.ratio(SATURATED, figure, ours, peer)
            yield Reading(
                name=f"against {peer}: {what}",
                status="ok",
                value=ratio if ratio is not None else "",
                unit="x",
                limit="more is better" if figure == "tokens" else "less is better",
            )
    path = run.folder / "splitfuse-serving.json"
    save(path, found, conditions(requests=suite.requests, rate=_RATE))
    yield Reading(name="report", status="ok", value=str(path))
