"""Passes that are recorded once and replayed: CUDA graphs around the runner's own pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.equivalence import decoder
from core.errors import EngineError
from core_splitfuse.attention.spans import Span

if TYPE_CHECKING:
    from core_splitfuse.attention.gpu import Paged, Plan

logger = logging.getLogger("core")

_LONGEST = 2**15
"""Tokens of a sequence that recorded passes have room for, where a model can hold more."""


class Recorded:
    """Records passes by number of tokens, as long as the model's tensors stay where they are.

    Args:
        model: the live module.
        store: keys and values.
        forward: one pass of the model, with token ids, positions and rows of a plan in force.
        sequences: in a pass at most.
    """

    def __init__(
        self,
        model: nn.Module,
        store: Paged,
        forward: Callable[[Tensor, Tensor, Tensor], Tensor],
        sequences: int,
    ) -> None:
        from core_splitfuse.attention.gpu import GraphRunner

        self.store = store
        self._model = model
        self._forward = forward
        self._places = self._addresses()
        self._gave_up = False
        config: Any = getattr(decoder(model), "config", None)
        longest = min(getattr(config, "max_position_embeddings", None) or _LONGEST, _LONGEST)
        self._graphs = GraphRunner(
            self._pass,
            block_size=store.block_size,
            device=next(model.parameters()).device,
            sequences=sequences,
            blocks=-(-int(longest) // store.block_size),
        )

    def run(self, ids: Sequence[int], spans: Sequence[Span], rows: Sequence[int]) -> Tensor | None:
        """Logits (R, vocabulary) of ``rows``, or ``None`` for a pass that is not for graphs."""
        if self._gave_up or not self._graphs.takes(len(ids), spans, len(rows)):
            return None
        places = self._addresses()
        if places != self._places:
            self._graphs.forget()
            self._places = places
        try:
            return self._graphs.run(ids, spans, rows)
        except EngineError as error:
            logger.warning("passes are not recorded: %s", error)
            self._gave_up = True
            self._graphs.forget()
            return None

    def _pass(self, plan: Plan) -> Tensor:
        with self.store.planned(plan):
            return self._forward(plan.ids, plan.positions, plan.rows)

    def _addresses(self) -> int:
        # A graph reads the memory that it was recorded with.
        return hash(
            tuple(p.data_ptr() for p in self._model.parameters() if type(p) is nn.Parameter)
        )


def can_be_recorded(device: torch.device, wanted: str) -> bool:
    """Whether passes on a device are recorded."""
    return device.type == "cuda" and wanted == "auto"
