"""A call that reports from within becomes something that can be run step by step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from core.errors import EngineError

T = TypeVar("T")


class Stepwise(Generic[T]):
    """Runs a function in a thread that waits whenever it has reported something.

    Only one of the two threads runs at any time.

    Args:
        work: is given ``report``, to be called with each piece.

    Example:
        >>> steps = Stepwise(lambda report: [report(n) for n in (1, 2)])
        >>> [steps.next(), steps.next(), steps.next()]
        [1, 2, None]
    """

    def __init__(self, work: Callable[[Callable[[T], None]], object]) -> None:
        self._work = work
        self._go, self._stop = threading.Semaphore(0), threading.Semaphore(0)
        self._piece: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def next(self) -> T | None:
        """Run to the next report, and return it; ``None`` at the end.

        Raises:
            EngineError: when the function raised.
        """
        self._piece = None
        self._go.release()
        self._stop.acquire()
        if self._error is not None:
            raise EngineError("the peer failed", why=str(self._error)) from self._error
        return self._piece

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._work(self._report)
        except BaseException as error:
            self._error = error
        self._piece = None
        self._stop.release()

    def _report(self, piece: T) -> None:
        self._piece = piece
        self._stop.release()
        self._go.acquire()
