"""The version of a model's weights: notices every change in place, also one that nobody told of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from core.equivalence import decoder
from core.positions.rotation import in_force


class Weights:
    """Counts changes of a model: of its parameters, its adapters and its policy of positions.

    Args:
        model: the live module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.version = 0
        self._decoder = decoder(model)
        # Looked up anew every time: sharding and training replace parameters.
        self._places = [
            (module, name)
            for module in model.modules()
            for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
        ]
        self._tuners: list[Any] = [
            module
            for module in model.modules()
            if hasattr(module, "merged_adapters") and hasattr(module, "disable_adapters")
        ]
        self._seen = self._state()

    def raised(self) -> bool:
        """Raise the version if something changed since the last call, and tell whether it did."""
        now = self._state()
        if now == self._seen:
            return False
        self._seen = now
        self.version += 1
        return True

    def raise_version(self) -> None:
        """Raise the version in any case."""
        self._seen = self._state()
        self.version += 1

    def _state(self) -> tuple[Any, ...]:
        """What differs after a change. Tensors count their changes themselves."""
        counts = tuple(map(_count, self._tensors()))
        adapters = tuple((str(t.active_adapters), t.disable_adapters) for t in self._tuners)
        rotation = in_force(self._decoder)
        return counts, adapters, None if rotation is None else id(rotation.policy)

    def _tensors(self) -> Iterator[Tensor]:
        for module, name in self._places:
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                yield tensor


def _count(tensor: Tensor) -> tuple[int, int]:
    # Weights that were made in inference mode keep no count.
    return id(tensor), 0 if tensor.is_inference() else tensor._version
