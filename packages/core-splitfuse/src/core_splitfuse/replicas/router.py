"""Ray Serve's choice of a replica, made as :mod:`core_splitfuse.replicas.choice` says.

Ray's own prefix-aware router counts requests; a request of ten thousand tokens is none of ten.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from core_splitfuse.replicas.choice import Prefixes, in_order

_ON_ITS_WAY = 2.0
"""Seconds in which a call that was given a replica arrives there, or is given up."""

_Base: Any = import_module("ray.serve.request_router").RequestRouter


class PrefixRouter(_Base):  # type: ignore[misc]  # pyright: ignore[reportUntypedBaseClass]
    """Routes calls by the prefixes they share, and by the tokens that replicas have to compute.

    Ray Serve builds one in the process of the handle, and calls it in one event loop.
    """

    def initialize_state(self, *, threshold: int) -> None:
        self._threshold = threshold
        self._prefixes = Prefixes()
        self._loads: Counter[str] = Counter()
        self._open: dict[str, tuple[str, int]] = {}
        self._chosen: dict[str, tuple[str, int, float]] = {}

    async def choose_replicas(
        self, candidate_replicas: Sequence[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """One replica in every rank: the next one is for when those before take no more calls."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        call = _call(pending_request)
        blocks = call.blocks if call else ()
        known = {name: self._prefixes.known(name, blocks) for name in by_name}
        order = in_order(by_name, known, self._loads_now(), self._threshold)
        if call and order:
            # Or all calls of a burst would go where there was little to do before it.
            number = pending_request.metadata.internal_request_id
            self._chosen[number] = order[0], call.tokens, time.monotonic()
        return [[by_name[name]] for name in order]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        call = _call(pending_request)
        if call is None:
            return
        self._chosen.pop(pending_request.metadata.internal_request_id, None)
        name = replica_id.unique_id
        self._prefixes.remember(name, call.blocks)
        self._open[pending_request.metadata.internal_request_id] = name, call.tokens
        self._loads[name] += call.tokens

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        name, tokens = self._open.pop(internal_request_id, ("", 0))
        if name in self._loads:
            self._loads[name] -= tokens

    def update_replicas(self, replicas: list[Any]) -> None:
        names = {replica.replica_id.unique_id for replica in replicas}
        self._prefixes.keep_only(names)
        for name in self._loads.keys() - names:
            del self._loads[name]
        super().update_replicas(replicas)

    def _loads_now(self) -> Counter[str]:
        """Tokens that replicas have to compute, those of calls on their way included."""
        late = time.monotonic() - _ON_ITS_WAY
        for number in [n for n, (_, _, at) in self._chosen.items() if at < late]:
            del self._chosen[number]
        loads = Counter(self._loads)
        for name, tokens, _ in self._chosen.values():
            loads[name] += tokens
        return loads


def _call(pending: Any) -> Any:
    """What is being routed; figures are asked for without one."""
    return pending.args[0] if pending is not None and pending.args else None
