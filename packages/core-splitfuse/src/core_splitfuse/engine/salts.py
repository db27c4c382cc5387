"""What cached keys and values depend on, as the salt of a request's blocks."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from core.identity import identity_of
from core_splitfuse.engine.active import Active, looks_at_prompts


class Salts:
    """Salts of requests under the present weights.

    Args:
        model: the live module.
        shares: whether anything is shared at all.
    """

    def __init__(self, model: nn.Module, *, shares: bool) -> None:
        self._model = model
        self._shares = shares
        self._base = identity_of(model, "0")

    def renew(self, version: int) -> None:
        """Note that weights, adapters or positions changed."""
        self._base = identity_of(self._model, str(version))

    def of(self, active: Active) -> str | None:
        """The salt of a request; ``None`` where nothing of it is shared."""
        if not self._shares or looks_at_prompts(active.policy):
            return None
        identity = self._base
        if active.policy is not None:
            identity = identity.with_positions(active.policy)
        regime = str(active.regime) if any(active.regime) else ""
        own = active.extras.cache_salt
        return replace(
            identity, regime=regime, extras={"splitfuse.salt": own} if own else {}
        ).salt()
