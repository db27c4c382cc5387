"""One pass: the packed row of many sequences through the transformers model itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from core.attention import AttentionSwitch
from core.engines.common import evaluating
from core.equivalence import decoder
from core.errors import ModelError
from core.positions.policy import ModelPositions
from core.positions.rotary import Rotary
from core.positions.rotation import in_force as policy_in_force
from core_splitfuse.attention.function import NAME, Work, in_force, register
from core_splitfuse.attention.rotating import ByLength, ByPolicy, Turning
from core_splitfuse.attention.spans import Ragged, Span
from core_splitfuse.attention.store import Store
from core_splitfuse.engine.recorded import Recorded, can_be_recorded
from core_splitfuse.settings import SplitFuseSettings


class Runner:
    """Calls a model with packed rows; between the calls the model is as it was.

    Args:
        model: a causal language model of transformers.
        settings: of the engine.

    Raises:
        ModelError: for a model whose attention cannot be replaced, by its class.
    """

    def __init__(self, model: nn.Module, settings: SplitFuseSettings) -> None:
        register()
        self.model = model
        self._decoder = decoder(model)
        self._switch = AttentionSwitch(model, NAME)
        self.settings = settings
        self._rotary = _rotary(model, settings.unrotated_keys)
        self._recorded: Recorded | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def policy(self) -> Any:
        """The policy of positions in force on the model, or ``None``."""
        rotation = policy_in_force(self._decoder)
        return None if rotation is None else rotation.policy

    def run(
        self,
        ids: Sequence[int],
        spans: Sequence[Span],
        store: Store,
        rows: Sequence[int],
        *,
        record: bool = True,
    ) -> Tensor:
        """Run one pass.

        Args:
            ids: token ids of the packed row.
            spans: the sequences they are of.
            store: where keys and values are.
            rows: tokens whose logits are wanted.
            record: whether it may be recorded, and replayed from then on.

        Returns:
            (R, vocabulary) logits of ``rows``, in the model's dtype.
        """
        device = self.device
        with ExitStack() as stack:
            if device.type == "cuda":
                # The current device is one of the thread, and engines run in threads of servers.
                stack.enter_context(torch.cuda.device(device))
            turning = self._turning(stack)
            recorded = self._recording(store) if record and not turning else None
            logits = recorded.run(ids, spans, rows) if recorded else None
            if logits is not None:
                return logits
            ragged = Ragged(spans, store.block_size, device)
            # A head wants at least one row.
            wanted = torch.tensor(list(rows) or [len(ids) - 1], device=device)
            inputs = torch.tensor(ids, device=device), ragged.positions.squeeze(0), wanted
            return self._forward(*inputs, Work(ragged, store, turning))[: len(rows)]

    def _forward(self, ids: Tensor, positions: Tensor, rows: Tensor, work: Work) -> Tensor:
        """(R, vocabulary) logits; ``ids`` and ``positions`` are those (T,) of the packed row."""
        with evaluating(self.model), self._switch, in_force(work):
            out = self.model(
                input_ids=ids.long().unsqueeze(0),
                position_ids=positions.long().unsqueeze(0),
                use_cache=False,
                logits_to_keep=rows.long(),
            )
        logits: Tensor = out.logits[0]
        return logits

    def _recording(self, store: Store) -> Recorded | None:
        """What replays passes over a store, where that is possible."""
        if not can_be_recorded(self.device, self.settings.graphs):
            return None
        if self._recorded is None or self._recorded.store is not store:
            nothing = Work(Ragged((), store.block_size, self.device), store)
            forward = partial(self._forward, work=nothing)
            sequences = self.settings.sequences
            self._recorded = Recorded(self.model, cast(Any, store), forward, sequences)
        return self._recorded

    def _turning(self, stack: ExitStack) -> Turning | None:
        """What rotates in this pass, if the model does not."""
        rotation = policy_in_force(self._decoder)
        if rotation is not None:
            return ByPolicy(rotation.rotary, rotation.policy)
        if self._rotary is None:
            return None
        stack.callback(self._rotary.replace())
        if self.settings.unrotated_keys:
            return ByPolicy(self._rotary, ModelPositions(per_request=True))
        return ByLength(self._rotary)


def _rotary(model: nn.Module, unrotated: bool) -> Rotary | None:
    """The model's rotation, where it must not happen inside the model."""
    if policy_in_force(decoder(model)) is not None:
        return None
    try:
        rotary = Rotary.of(model)
    except ModelError:
        if unrotated:
            raise
        return None  # Without a rotary embedding that tells, no length changes anything.
    kinds: Any = getattr(rotary.embedding, "rope_type", "default")
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    by_length = any("dynamic" in str(name) or name == "longrope" for name in names)
    return rotary if by_length or unrotated else None
