"""The loop that owns an engine: one thread steps it, and handlers of asyncio wait for tokens."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import partial
from typing import Any

from core import Engine, EngineError, EngineStats, Request, Token

logger = logging.getLogger("core.serve")

Batch = list[tuple[int, Token]]

_FAILURES = 3
"""Passes that may fail in a row, without a token in between, before the engine is given up."""

_PAUSE = 0.005
"""Seconds until the next step of an engine that is busy but could do nothing."""


class BusyError(EngineError):
    """Too many requests wait already; ``retry_after`` is in seconds."""

    retry_after = 1


class UnavailableError(EngineError):
    """The loop takes no requests: it drains, it has ended, or the engine hangs."""


class Ticket:
    """The requests of one call, and the tokens that come for them.

    Made by :meth:`EngineLoop.submit`, and used in the event loop that called it.
    """

    def __init__(self, owner: EngineLoop, count: int) -> None:
        self.numbers: list[int] = []
        self.events = asyncio.get_running_loop()
        self._owner = owner
        self._open = set(range(count))
        self._queue: asyncio.Queue[Batch | EngineError] = asyncio.Queue()

    def put(self, batch: Batch | EngineError) -> None:
        """Hand over tokens, or why there will be no more; in the ticket's event loop."""
        self._queue.put_nowait(batch)

    def cancel(self, index: int | None = None) -> None:
        """End one request, or all that have not ended; nothing more comes of them."""
        gone = self._open if index is None else self._open & {index}
        if gone:
            self._owner.cancel(self, sorted(gone))
            self._open = self._open - gone

    async def tokens(self) -> AsyncGenerator[tuple[int, Token]]:
        """The tokens as they come, each with the index of its request, until all have ended.

        Raises:
            UnavailableError: when the loop ends first.
        """
        while self._open:
            batch = await self._queue.get()
            if isinstance(batch, EngineError):
                self._open = set()
                raise batch
            for index, token in batch:
                if index in self._open:
                    if token.finish is not None:
                        self._open.discard(index)
                    yield index, token


class EngineLoop:
    """Runs an engine in a thread of its own, the only one that touches it.

    An exception that escapes a step ends the requests in flight with the finish reason ``error``.
    The loop goes on with the next ones, unless passes keep failing: then it has ended for good.

    Args:
        engine: any engine; closed with the loop.
        max_waiting: requests that may wait for their first token.
        stuck_after: seconds without a pass, while there is work, until the engine counts as stuck.

    Example::

        with EngineLoop(run.engine(model)) as loop:
            ticket = await loop.submit([Request(prompt=[1, 2, 3])])
            async for index, token in ticket.tokens():
                print(index, token.id)
    """

    def __init__(
        self, engine: Engine, *, max_waiting: int = 256, stuck_after: float = 60.0
    ) -> None:
        self.max_waiting = max_waiting
        self.stuck_after = stuck_after
        self.draining = False
        self._engine = engine
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._owners: dict[int, tuple[Ticket, int]] = {}
        self._unstarted: set[int] = set()
        self._waiting = 0
        self._failures = 0
        self._working = self._closing = False
        self._ended = ""
        self._stats = engine.stats()
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="core-engine-loop", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why nothing can be answered now; empty when all is well."""
        if self._ended:
            return self._ended
        idle = time.monotonic() - self._progress
        if (self._working or self._inbox) and idle > self.stuck_after:
            return f"requests are queued, and no pass ended for {idle:.0f} s"
        return ""

    @property
    def idle(self) -> bool:
        """Whether no request is in flight."""
        return not (self._owners or self._inbox)

    @property
    def stats(self) -> EngineStats:
        """The engine's own figures after its last pass."""
        return self._stats

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """Queue the requests of one call: all of them, or none.

        Raises:
            BusyError: when too many wait.
            UnavailableError: when the loop takes no requests.
            EngineError: when the engine refuses one of them.
        """
        ticket = Ticket(self, len(requests))
        added = ticket.events.create_future()
        with self._wake:
            self._require_room(len(requests))
            self._waiting += len(requests)
            self._post(partial(self._start, ticket, requests, added))
        try:
            await asyncio.wait_for(added, self.stuck_after)
        except TimeoutError:
            ticket.cancel()
            raise UnavailableError("the engine does not answer", why=self.problem) from None
        except asyncio.CancelledError:
            ticket.cancel()
            raise
        return ticket

    def cancel(self, ticket: Ticket, indices: Sequence[int]) -> None:
        """End requests of a ticket; their memory is free after the next step."""
        with self._wake:
            self._post(partial(self._cancel, ticket, indices))

    def drain(self) -> None:
        """Take no more requests; those in flight go on."""
        self.draining = True

    def close(self, timeout: float = 10.0) -> None:
        """End the thread after the pass that runs, and close the engine.

        Args:
            timeout: seconds to wait for that pass.
        """
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)

    def __enter__(self) -> EngineLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_room(self, count: int) -> None:
        if self.draining:
            raise UnavailableError("the server is shutting down")
        if self.problem:
            raise UnavailableError("the server cannot answer", why=self.problem)
        # A call larger than the queue is taken when nobody else waits, or it never would be.
        if self._waiting and self._waiting + count > self.max_waiting:
            what = f"{self._waiting} requests wait already"
            raise BusyError(what, why=f"at most {self.max_waiting} may", fix="try again later")

    def _post(self, command: Callable[[], None]) -> None:
        """Let the thread do something before its next step; the lock is held."""
        if not (self._working or self._inbox):
            self._progress = time.monotonic()
        self._inbox.append(command)
        self._wake.notify()

    # What follows runs in the thread.

    def _run(self) -> None:
        reason = "the server is shutting down"
        try:
            while self._next():
                self._step()
        except BaseException as error:
            logger.exception("the engine's loop has ended")
            reason = f"the engine's loop has ended: {type(error).__name__}: {error}"
        finally:
            self._end(reason)

    def _next(self) -> bool:
        """Wait for work, and take in what was posted; whether to go on."""
        with self._wake:
            while not (self._inbox or self._working or self._closing):
                self._wake.wait()
            commands = list(self._inbox)
        if self._closing:
            return False
        for command in commands:
            command()
        with self._wake:
            # Only now: what is being taken in counts as work, so that a hanging engine shows.
            for _ in commands:
                self._inbox.popleft()
            self._working = self._engine.busy
        return True

    def _start(
        self, ticket: Ticket, requests: Sequence[Request], added: asyncio.Future[None]
    ) -> None:
        try:
            for index, request in enumerate(requests):
                number = self._engine.add(request)
                ticket.numbers.append(number)
                self._owners[number] = ticket, index
                self._unstarted.add(number)
        except Exception as error:
            self._cancel(ticket, range(len(ticket.numbers)))
            self._less_waiting(len(requests) - len(ticket.numbers))
            ticket.numbers.clear()
            _tell(ticket, _fail, added, error)
            return
        _tell(ticket, _succeed, added)

    def _cancel(self, ticket: Ticket, indices: Iterable[int]) -> None:
        for number in [ticket.numbers[i] for i in indices if i < len(ticket.numbers)]:
            if self._owners.pop(number, None):
                self._engine.cancel(number)
                self._begun(number)

    def _step(self) -> None:
        if not self._working:
            return
        try:
            tokens = self._engine.step()
        except Exception:
            logger.exception("a pass failed, and %d requests with it", len(self._owners))
            self._fail_all()
            return
        if any(token.id >= 0 for token in tokens):
            self._failures = 0
        self._deliver(tokens)
        stats = self._engine.stats()
        if tokens or stats.passes != self._stats.passes:
            self._progress = time.monotonic()
            self._stats = stats
        else:
            with self._wake:
                self._wake.wait(_PAUSE)

    def _fail_all(self) -> None:
        self._failures += 1
        if self._failures >= _FAILURES:
            raise EngineError(f"{self._failures} passes failed in a row")
        numbers = list(self._owners)
        for number in numbers:
            self._engine.cancel(number)
        self._deliver([Token(request=number, id=-1, finish="error") for number in numbers])

    def _deliver(self, tokens: Iterable[Token]) -> None:
        batches: dict[Ticket, Batch] = {}
        for token in tokens:
            if token.request not in self._owners:
                continue
            ticket, index = self._owners[token.request]
            batches.setdefault(ticket, []).append((index, token))
            self._begun(token.request)
            if token.finish is not None:
                del self._owners[token.request]
        for ticket, batch in batches.items():
            _tell(ticket, ticket.put, batch)

    def _begun(self, number: int) -> None:
        """Note that a request waits no longer for its first token."""
        if number in self._unstarted:
            self._unstarted.discard(number)
            self._less_waiting(1)

    def _less_waiting(self, count: int) -> None:
        with self._wake:
            self._waiting -= count

    def _end(self, reason: str) -> None:
        """Tell everybody who waits, and close the engine."""
        with self._wake:
            self._ended = reason
            commands = list(self._inbox)
            self._inbox.clear()
        gone = UnavailableError("the server cannot answer", why=reason)
        for ticket in {ticket for ticket, _ in self._owners.values()}:
            _tell(ticket, ticket.put, gone)
        for command in commands:
            if isinstance(command, partial) and command.func == self._start:
                ticket, _, added = command.args
                _tell(ticket, _fail, added, gone)
        self._owners.clear()
        self._working = False
        try:
            self._engine.close()
        except Exception:
            logger.exception("the engine cannot be closed")


def _tell(ticket: Ticket, what: Callable[..., object], *args: Any) -> None:
    """Call something in the event loop of a ticket, unless that has ended."""
    try:
        ticket.events.call_soon_threadsafe(what, *args)
    except RuntimeError:
        logger.debug("an event loop ended before its requests")


def _succeed(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
