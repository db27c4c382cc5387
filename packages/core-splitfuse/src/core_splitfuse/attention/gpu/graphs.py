"""CUDA graphs of whole passes, by padded number of tokens.

A pass of few tokens is over sooner than Python can launch its kernels one by one. A graph launches
all of them at once, with fixed sizes and addresses: a pass is padded to one of a few numbers of
tokens, and its plan is written to the place that the graph reads. Rows of padding belong to a
sequence without keys; nothing is stored for them, and nobody sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import EngineError
from core_splitfuse.attention.gpu.atoms import Spread
from core_splitfuse.attention.gpu.plan import Plan, Room, Span

Forward = Callable[[Plan], Tensor]
"""From a plan with its ``ids``, ``positions`` and ``rows`` to (R, vocabulary) logits of the rows.

It must not ask the device for a number, and read tensors of the plan only, through the plan.
"""


def padded(tokens: int) -> int:
    """Number of tokens of the graph that serves a pass.

    Powers of two up to 64, steps of 64 up to 512, steps of 128 beyond, so that at most a few dozen
    graphs exist and long passes waste little.
    """
    if tokens <= 64:
        return max(8, 1 << (tokens - 1).bit_length())
    step = 64 if tokens <= 512 else 128
    return -(-tokens // step) * step


@dataclass
class _Captured:
    """One size: its plan, and from the second pass on its graph with what it writes."""

    plan: Plan
    graph: torch.cuda.CUDAGraph | None = None
    out: Tensor | None = None


class GraphRunner:
    """Runs passes through graphs, and captures those that are missing.

    Args:
        forward: one pass of the model.
        block_size: tokens in a block of the store.
        device: where; without CUDA passes are padded in the same way and nothing is captured.
        sequences: in a pass at most.
        blocks: of a sequence at most.
        most_tokens: of a pass; longer ones are not for graphs.
        spread: how programs share keys; by the device unless given.

    Example::

        runner = GraphRunner(forward, block_size=64, device=device, sequences=256, blocks=512)
        if runner.takes(len(ids), spans, len(rows)):
            logits = runner.run(ids, spans, rows)
    """

    def __init__(
        self,
        forward: Forward,
        *,
        block_size: int,
        device: torch.device,
        sequences: int,
        blocks: int,
        most_tokens: int = 2048,
        spread: Spread | None = None,
    ) -> None:
        self._forward = forward
        self._block_size = block_size
        self._device = device
        self._sequences = sequences
        self._blocks = blocks
        self._most_tokens = most_tokens
        self._spread = spread
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._pool: Any = None

    @property
    def sizes(self) -> list[tuple[int, bool]]:
        """Numbers of tokens that have been prepared, each with whether it is for decodes only."""
        return sorted(self._captured)

    def takes(self, tokens: int, spans: Sequence[Span], rows: int) -> bool:
        """Whether a pass is for graphs."""
        longest = max(span.end for span in spans)
        return (
            tokens <= self._most_tokens
            and len(spans) <= self._sequences
            and rows <= len(spans)
            and longest <= self._blocks * self._block_size
        )

    def run(self, ids: Sequence[int], spans: Sequence[Span], rows: Sequence[int]) -> Tensor:
        """Run a pass.

        Args:
            ids: token ids of the packed row.
            spans: sequences, in the order of the row.
            rows: tokens whose logits are wanted, one of each sequence at most.

        Returns:
            (R, vocabulary) logits of ``rows``; the next pass overwrites them.

        Raises:
            EngineError: for a pass that is too large, or a model that cannot be captured.
        """
        decodes = len(ids) == len(spans)
        key = padded(len(ids)), decodes
        if key not in self._captured:
            self._captured[key] = _Captured(self._plan(*key))
        size = self._captured[key]
        size.plan.fill(spans, ids, rows)
        if self._device.type != "cuda":
            return self._forward(size.plan)[: len(rows)]
        if size.graph is None:
            self._capture(size, spans, ids, rows)
        assert size.graph is not None
        assert size.out is not None
        size.graph.replay()
        return size.out[: len(rows)]

    def forget(self) -> None:
        """Give graphs and their memory back, as after the store or a parameter has moved."""
        self._captured.clear()
        self._pool = None

    def _plan(self, tokens: int, decodes: bool) -> Plan:
        sequences = min(self._sequences, tokens)
        room = Room(tokens, sequences, self._blocks, rows=sequences, decodes=decodes)
        return Plan(self._block_size, self._device, room=room, spread=self._spread)

    def _capture(
        self, size: _Captured, spans: Sequence[Span], ids: Sequence[int], rows: Sequence[int]
    ) -> None:
        try:
            # Libraries and kernels set themselves up in passes outside of a capture; writing the
            # same keys and values twice does no harm.
            stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._forward(size.plan)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            # Now it knows the kinds of layers, and all its numbers are in one place.
            size.plan.fill(spans, ids, rows)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                size.out = self._forward(size.plan)
            size.graph = graph
        except RuntimeError as error:
            raise EngineError(
                "this model cannot be captured in a CUDA graph",
                why=str(error).splitlines()[0],
                fix="run it without graphs",
            ) from error
