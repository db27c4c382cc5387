"""Whose queries and keys are rotated, and where they stand: what a policy of positions sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core.positions.rotary import Rotary


@dataclass
class RequestState:
    """One request, from its first token to its last, as a policy of positions sees it.

    Args:
        length: its tokens that are known so far; an engine that decides regimes at admission puts
            the largest length that the request may reach.
        kept: what the policy decided, by keys of its own choice (usually the layer index).
    """

    length: int = 0
    kept: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """The tokens behind the queries or keys that are to be rotated.

    The same for a padded batch (row b is request b) and for a ragged one, where a single row holds
    tokens of several requests and ``owner`` tells them apart.

    Args:
        rotary: the model's own rotation.
        positions: (B, T) absolute positions in their requests.
        requests: the requests.
        owner: (B, T) index of each token's request; ``None`` when row b belongs to request b.
        keys: whether the tokens are keys.
    """

    rotary: Rotary
    positions: Tensor
    requests: Sequence[RequestState]
    owner: Tensor | None = None
    keys: bool = False

    def spread(self, values: Tensor) -> Tensor:
        """Give each token its request's value: (R, ...) becomes (B, T, ...)."""
        if self.owner is not None:
            return values[self.owner]
        batch, length = self.positions.shape
        return values.unsqueeze(1).expand(batch, length, *values.shape[1:])

    def rotate(
        self,
        module: nn.Module,
        x: Tensor,
        positions: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Rotate with the model's own rotation, at positions of the policy's choice.

        Args:
            module: the attention module.
            x: (B, H, T, D), not rotated.
            positions: (B, T) or (B, H, T), possibly fractional; the tokens' own by default.
            lengths: length of each request that picks its frequencies; its own by default.
        """
        positions = self.positions if positions is None else positions
        lengths = [request.length for request in self.requests] if lengths is None else lengths
        regimes = [self.rotary.regime(module, length) for length in lengths]
        first, *others = sorted(set(regimes))
        if not others:
            return self.rotary.rotate(module, x, positions, first)
        table = torch.tensor(regimes, device=x.device)
        result: Tensor | None = None
        for regime in (first, *others):
            mine = self.spread(table == regime).unsqueeze(1)
            # Positions of other regimes would be out of range in this one.
            hidden = ~(mine if positions.dim() == 3 else mine.squeeze(1))
            turned = self.rotary.rotate(module, x, positions.masked_fill(hidden, 0), regime)
            result = turned if result is None else torch.where(mine.unsqueeze(-1), turned, result)
        assert result is not None
        return result
