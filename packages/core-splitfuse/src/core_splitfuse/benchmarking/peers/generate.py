"""``model.generate``: one request after the other, or padded batches that end together."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from core.engines import Request, Token
from core_splitfuse.benchmarking.peers.peer import Opened, Peer
from core_splitfuse.benchmarking.peers.stepwise import Stepwise
from core_splitfuse.benchmarking.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

Column = list[int]
"""One new token of each row of a batch."""


def one_by_one(loads: tuple[str, ...] = ()) -> Peer:
    """Each request on its own."""
    return Peer("generate, one by one", _opener(1), once=True, loads=loads)


def padded(rows: int = 8) -> Peer:
    """Up to ``rows`` waiting requests at once, padded to the longest."""
    return Peer(f"generate, batches of {rows}", _opener(rows), once=True)


def _opener(rows: int) -> Callable[[Subject], Opened]:
    return lambda subject: Opened(Generating(subject.build(), rows))


class Generating:
    """Serves with transformers' ``generate``, which takes nobody in while it runs.

    Args:
        model: a causal language model of transformers.
        rows: requests in a batch at most.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self._model: Any = model
        self._rows = rows
        self._ids = itertools.count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._batch: list[tuple[int, Request]] = []
        self._made = 0
        self._running: Stepwise[Column] | None = None

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self._running is not None

    def add(self, request: Request) -> int:
        number = next(self._ids)
        self._waiting.append((number, request))
        return number

    def step(self) -> list[Token]:
        if self._running is None:
            self._begin()
        assert self._running is not None
        column = self._running.next()
        if column is None:
            self._running = None
            return []
        self._made += 1
        rows = zip(self._batch, column, strict=True)
        return [
            Token(request=number, id=token, finish="length" if self._made == most else None)
            for (number, request), token in rows
            if self._made <= (most := request.sampling.max_new_tokens)
        ]

    def close(self) -> None:
        self._waiting.clear()
        while self._running is not None:
            self.step()

    def _begin(self) -> None:
        count = min(self._rows, len(self._waiting))
        self._batch = [self._waiting.popleft() for _ in range(count)]
        self._made = 0
        requests = [request for _, request in self._batch]
        self._running = Stepwise(lambda report: _generate(self._model, requests, report))


def _generate(model: Any, requests: Sequence[Request], report: Callable[[Column], None]) -> None:
    import torch

    prompts = [list(request.prompt) for request in requests]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor(
        [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    most = max(request.sampling.max_new_tokens for request in requests)

    def heard(found: Tensor, _: object, **__: object) -> Tensor:
        report(found[:, -1].tolist())
        return torch.zeros(len(found), dtype=torch.bool, device=found.device)

    transformers: Any = import_module("transformers")
    model.generate(
        ids,
        attention_mask=mask,
        generation_config=transformers.GenerationConfig(
            do_sample=False, max_new_tokens=most, eos_token_id=None, pad_token_id=0
        ),
        stopping_criteria=transformers.StoppingCriteriaList([heard]),
    )
