"""Continuous batching of transformers, which ``generate_batch`` runs in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from core.engines import FinishReason, Request, Token
from core_splitfuse.benchmarking.peers.peer import Opened, Peer
from core_splitfuse.benchmarking.subject import Subject

if TYPE_CHECKING:
    from torch import nn

PAGE = 256
"""Tokens of a page, as transformers has it unless told."""


def continuous(budget: int, *, tokens: int = 32_768, once: bool = False) -> Peer:
    """Passes of up to ``budget`` tokens, over a cache of ``tokens`` tokens."""
    return Peer(f"transformers CB {budget}", _opener(budget, tokens), once=once)


def _opener(budget: int, tokens: int) -> Callable[[Subject], Opened]:
    return lambda subject: Opened(Continuous(subject.build(), budget, tokens))


class Continuous:
    """Runs the batch processor of transformers' continuous batching step by step.

    It is the loop that the manager's thread runs, without the thread: a clock of processor time has
    to see one step after the other.

    Args:
        model: a causal language model of transformers.
        budget: tokens of a pass.
        tokens: of which keys and values are held.
    """

    def __init__(self, model: nn.Module, budget: int, tokens: int) -> None:
        transformers: Any = import_module("transformers")
        self._model = cast(Any, model)
        config = transformers.ContinuousBatchingConfig(
            max_batch_tokens=budget, num_blocks=-(-tokens // PAGE), page_size=PAGE
        )
        wanted = transformers.GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1)
        self._manager: Any = self._model.init_continuous_batching(wanted, config)
        self._processor: Any = self._manager._create_batch_processor()
        # As generate_batch does it: shapes are tried before anybody waits.
        self._processor.warmup(self._model)
        self._made: dict[int, int] = {}

    @property
    def busy(self) -> bool:
        return bool(self._made)

    def add(self, request: Request) -> int:
        most = request.sampling.max_new_tokens
        name = self._manager.add_request(list(request.prompt), max_new_tokens=most, streaming=True)
        number = int(name.removeprefix("req_"))
        self._made[number] = 0
        return number

    def step(self) -> list[Token]:
        processor = self._processor
        if processor.prepare_next_batch():
            processor._generation_step(self._model)
            processor.update_batch()
        found = self._manager.output_router.output_queue
        return [token for _ in range(found.qsize()) for token in self._new(found.get())]

    def close(self) -> None:
        self._made.clear()
        self._manager.destroy()

    def _new(self, output: Any) -> list[Token]:
        """Tokens that an output has more than the one before."""
        number = int(output.request_id.removeprefix("req_"))
        ids = output.generated_tokens[self._made[number] :]
        self._made[number] += len(ids)
        tokens = [Token(request=number, id=token) for token in ids]
        if not output.is_finished():
            return tokens
        del self._made[number]
        finish: FinishReason = "error" if output.error else "length"
        last = tokens.pop().id if tokens else -1
        return [*tokens, Token(request=number, id=last, finish=finish)]
