"""Rotary frequencies that change with the length of a request (longrope): when a cache is of no use."""

from __future__ import annotations

from torch import nn

from core.equivalence import decoder
from core.errors import ModelError
from core.positions.rotary import Rotary

_LONG = 2**24


class Regimes:
    """Which rotary frequencies hold for how many tokens, over all layers of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._attentions: list[nn.Module] = []
        try:
            self._rotary = Rotary.of(model)
        except ModelError:
            return  # Without a rotary embedding that tells, no length changes anything.
        attentions = [
            module
            for module in decoder(model).modules()
            if "Attention" in type(module).__name__ and hasattr(module, "layer_idx")
        ]
        # Asked for every token of every request: layers that always agree count once, and those of
        # which no length changes anything not at all.
        kinds = {tuple(self._rotary.regime(m, n) for n in (1, _LONG)): m for m in attentions}
        self._attentions = [module for kind, module in kinds.items() if any(kind)]

    def at(self, length: int) -> tuple[int, ...]:
        """Return what equals that of another length where one cache serves both."""
        return tuple(self._of(module, length) for module in self._attentions)

    def _of(self, module: nn.Module, length: int) -> int:
        now, soon = (self._rotary.regime(module, tokens) for tokens in (length, length + 1))
        # Frequencies that drift with every token (dynamic) are no regime: model.generate keeps its
        # cache then, and so does this engine.
        return 0 if (now, soon) == (length, length + 1) else now
