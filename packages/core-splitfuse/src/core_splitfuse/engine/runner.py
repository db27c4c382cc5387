"""One pass: the packed row of many sequences through the transformers model itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

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

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def policy(self) -> Any:
        """The policy of positions in force on the model, or ``None``."""
        rotation = policy_in_force(self._decoder)
        return None if rotation is None else rotation.policy

    def forget(self) -> None:
        """Forget what was recorded of the model, as after a change of its weights."""

    def run(
        self,
        ids: Sequence[int],
        spans: Sequence[Span],
        store: Store,
        rows: Sequence[int],
    ) -> Tensor:
        """Run one pass.

        Args:
            ids: token ids of the packed row.
            spans: the sequences they are of.
            store: where keys and values are.
            rows: tokens whose logits are wanted.

        Returns:
            (R, vocabulary) logits of ``rows``, in the model's dtype.
        """
        device = self.device
        ragged = Ragged(spans, store.block_size, device)
        # A head wants at least one row.
        wanted = torch.tensor(list(rows) or [len(ids) - 1], device=device)
        with ExitStack() as stack:
            if device.type == "cuda":
                # The current device is one of the thread, and engines run in threads of servers.
                stack.enter_context(torch.cuda.device(device))
            turning = self._turning(stack)
            stack.enter_context(evaluating(self.model))
            stack.enter_context(self._switch)
            stack.enter_context(in_force(Work(ragged, store, turning)))
            out = self.model(
                input_ids=torch.tensor([ids], device=device),
                position_ids=ragged.positions,
                use_cache=False,
                logits_to_keep=wanted,
            )
        logits: Tensor = out.logits[0, : len(rows)]
        return logits

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
