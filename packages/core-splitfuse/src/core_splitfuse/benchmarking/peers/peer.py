"""What a peer is, and what to say of one that is not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import EngineError
from core_splitfuse.benchmarking.driver import Served
from core_splitfuse.benchmarking.subject import Subject


class MissingPeerError(EngineError):
    """A peer cannot be measured here, because something is not installed."""


@dataclass(frozen=True)
class Opened:
    """A peer that is ready to serve.

    Args:
        engine: takes requests and makes tokens.
        seconds: what its clock runs by.
    """

    engine: Served
    seconds: Callable[[], float] = time.process_time


@dataclass(frozen=True)
class Peer:
    """Somebody to measure.

    Args:
        name: as tables call it.
        open: builds it for a model; raises :class:`MissingPeerError` where it cannot.
        once: measure it in the first round only, for it takes long.
        loads: names of the loads it is measured under; all of them when empty.
    """

    name: str
    open: Callable[[Subject], Opened]
    once: bool = False
    loads: tuple[str, ...] = ()
