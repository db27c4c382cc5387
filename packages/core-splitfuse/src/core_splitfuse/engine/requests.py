"""The open requests: who waits for whose prompt, and what becomes of them when one ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping

from core.engines import Request
from core.engines.regimes import Regimes
from core.positions.policy import Positions
from core_splitfuse.engine.active import Active, Extras
from core_splitfuse.engine.salts import Salts
from core_splitfuse.scheduling.scheduler import Scheduler
from core_splitfuse.scheduling.sequence import Sequence


class Requests(Mapping[int, Active]):
    """Requests by number, from the first one accepted on.

    Equal prompts that wait at the same time are computed once: the first request leads, the others
    follow, and own its blocks with it from their first token on.

    Args:
        scheduler: where sequences queue.
        salts: of their blocks.
        regimes: of rotary frequencies.
        follows: whether requests may wait for the prompt of another one.
    """

    def __init__(
        self, scheduler: Scheduler, salts: Salts, regimes: Regimes, *, follows: bool
    ) -> None:
        self._scheduler = scheduler
        self._salts = salts
        self._regimes = regimes
        self._follows = follows
        self._numbers = itertools.count(1)
        self._open: dict[int, Active] = {}
        self._leaders: list[Active] = []

    def __getitem__(self, number: int) -> Active:
        return self._open[number]

    def __iter__(self) -> Iterator[int]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)

    def accept(self, request: Request, extras: Extras, policy: Positions | None) -> Active:
        """Queue a request.

        Raises:
            EngineError: when it can never fit.
        """
        active = self._made(request, extras, policy)
        leader = next((a for a in self._leaders if active.twin_of(a)), None)
        if leader is not None and self._follows:
            self._scheduler.require_room(active.sequence)
            leader.followers.append(active)
        else:
            self._scheduler.add(active.sequence)
            self._leaders.append(active)
        self._open[active.number] = active
        return active

    def over(self) -> list[Active]:
        """Requests that were cancelled, and those whose time has come."""
        now = time.monotonic()
        return [
            active
            for active in self._open.values()
            if active.cancelled or (active.expires is not None and now >= active.expires)
        ]

    def begin(self, active: Active) -> list[Active]:
        """Note that a request's prompt is computed; returns it with those that waited for it."""
        if active not in self._leaders:
            return [active]
        self._leaders.remove(active)
        followers, active.followers = active.followers, []
        for twin in followers:
            twin.state.kept.update(active.state.kept)
            twin.begun.update(active.begun)
            self._scheduler.fork(active.sequence, twin.sequence)
        return [active, *followers]

    def extend(self, active: Active, token: int) -> None:
        """Add a token to a request that goes on."""
        sequence = active.sequence
        sequence.tokens.append(token)
        regime = self._regimes.at(len(sequence.tokens))
        if regime != active.regime:
            # Keys of other frequencies, and all that later layers made of them, are of no use.
            active.regime = regime
            self._scheduler.restart(sequence, self._salts.of(active))

    def recompute(self) -> None:
        """Everything that was computed is of other weights."""
        self._scheduler.recompute()
        for active in self._open.values():
            active.sequence.salt = self._salts.of(active)

    def forget(self, active: Active) -> None:
        """A request has ended; the first one that waited for its prompt takes its place."""
        del self._open[active.number]
        for leader in self._leaders:
            if active in leader.followers:
                leader.followers.remove(active)
                return
        self._scheduler.remove(active.sequence)
        if active in self._leaders:
            self._leaders.remove(active)
            if active.followers:
                heir, *heir.followers = active.followers
                self._leaders.append(heir)
                self._scheduler.add(heir.sequence)

    def _made(self, request: Request, extras: Extras, policy: Positions | None) -> Active:
        sequence = Sequence(
            next(self._numbers),
            list(request.prompt),
            len(request.prompt),
            request.sampling.max_new_tokens,
            priority=extras.priority,
            atomic=extras.atomic_prefill or bool(getattr(policy, "atomic_prefill", False)),
        )
        expires = None if extras.deadline is None else time.monotonic() + extras.deadline
        active = Active(request, sequence, extras, expires, policy)
        active.regime = self._regimes.at(len(sequence.tokens))
        sequence.salt = self._salts.of(active)
        return active
