"""The policy that rotates queries and keys, and the contract that lets every attention heed it.

A policy gets queries and keys as they were projected, with the positions of their tokens, and turns
them as it likes: by the model's own rule, with positions divided by a ratio for every head, or with
frequencies picked request by request. Caches under a policy hold unrotated keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from core.positions.tokens import RequestState, Tokens


@runtime_checkable
class Positions(Protocol):
    """A policy of positions. Keeps nothing about requests in itself, only in them.

    Attributes:
        name: short name.
        atomic_prefill: it must see a prompt in one piece, so an engine may neither cut the prompt
            into chunks nor take a prefix of it from a cache; a layer run in chunks is refused. A
            caller that feeds a prompt in pieces is not noticed.

    Example::

        class Interpolated:
            name, atomic_prefill = "interpolated", False

            def __init__(self, ratio): self.ratio = ratio
            def digest(self): return str(self.ratio)
            def begin(self, module, query, key, visible, requests): pass
            def rotate(self, module, x, tokens):
                return tokens.rotate(module, x, tokens.positions / self.ratio)

        with positions(model, Interpolated(2.0)):
            model.generate(tokens)
    """

    @property
    def name(self) -> str: ...

    @property
    def atomic_prefill(self) -> bool: ...

    def digest(self) -> str:
        """Everything that changes what the policy does, as text, for the identity of caches."""
        ...

    def begin(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        visible: Tensor,
        requests: Sequence[RequestState],
    ) -> None:
        """Look at prompts before their first rotation; called once for each layer and prompt.

        Args:
            module: the attention module; ``module.layer_idx`` tells the layer.
            query: (R, H, 1, D) unrotated query of each prompt's last token.
            key: (R, Hkv, T, D) unrotated keys of the prompts.
            visible: (R, T) which keys that last token sees: no padding, nothing out of its window.
            requests: the R requests; decisions go into ``request.kept``.
        """
        ...

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        """Rotate queries or keys.

        Args:
            module: the attention module.
            x: (B, H, T, D), not rotated.
            tokens: where they stand and whose they are; ``tokens.rotate`` is the model's own way.

        Returns:
            The same shape; for keys also one with a head for every query head.
        """
        ...


class ModelPositions:
    """The model's own positions: changes nothing.

    Args:
        per_request: frequencies that depend on the length (longrope) are picked for each request by
            its own length, so that its text does not depend on its neighbours. By default they
            follow the longest row of the batch, as transformers does.

    Example:
        >>> ModelPositions().name
        'model'
    """

    name = "model"
    atomic_prefill = False

    def __init__(self, *, per_request: bool = False) -> None:
        self.per_request = per_request

    def digest(self) -> str:
        """Return how lengths are taken."""
        return "per request" if self.per_request else "per batch"

    def begin(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        visible: Tensor,
        requests: Sequence[RequestState],
    ) -> None:
        """Nothing is decided by the prompt."""

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        """Rotate at the tokens' own positions."""
        lengths = [request.length for request in tokens.requests]
        if not self.per_request:
            lengths = [max(lengths)] * len(lengths)
        return tokens.rotate(module, x, lengths=lengths)
