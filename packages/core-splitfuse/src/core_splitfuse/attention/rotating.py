"""Rotation of queries and keys where the model must not do it itself.

Two cases. A policy of positions is in force: keys are stored unrotated, and rotated with the policy
when they are read. Or the model's frequencies depend on the length of its longest row: then every
sequence is rotated by its own length, and what is stored is rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from core.positions.policy import Positions
from core.positions.rotary import Rotary
from core.positions.tokens import RequestState, Tokens
from core_splitfuse.attention.dense import Rule, attend, first_seen
from core_splitfuse.attention.spans import Span

if TYPE_CHECKING:
    from core_splitfuse.attention.function import Work


class Turning(Protocol):
    """Attends with queries and keys that come unrotated."""

    def attend(
        self,
        module: nn.Module,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        work: Work,
        rule: Rule,
    ) -> Tensor:
        """From (H, T, D) to (T, H, Dv), for the packed row of the pass."""
        ...


class ByLength:
    """The model's own rotation, with the frequencies that each sequence's own length asks for.

    Longrope picks them by the tokens that are known, as the model does when it computes a prompt.
    Frequencies that drift with every token (dynamic) are those of the time when it was first seen.

    Args:
        rotary: the model's own rotation.
    """

    def __init__(self, rotary: Rotary) -> None:
        self.rotary = rotary

    def attend(
        self,
        module: nn.Module,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        work: Work,
        rule: Rule,
    ) -> Tensor:
        ragged = work.ragged
        lengths = [length for span in ragged.spans for length in self._lengths(module, span)]
        tokens = Tokens(
            self.rotary,
            ragged.positions,
            [RequestState(length) for length in lengths],
            torch.arange(len(lengths), device=ragged.device).unsqueeze(0),
        )
        query, key = (tokens.rotate(module, x.unsqueeze(0)).squeeze(0) for x in (query, key))
        work.store.write(layer, key, value, ragged)
        return work.store.attend(layer, query, ragged, rule)

    def _lengths(self, module: nn.Module, span: Span) -> Sequence[int]:
        drifts = self.rotary.regime(module, 2**24) != self.rotary.regime(module, 2**24 + 1)
        if not drifts:
            return [span.known] * len(span)
        return [max(span.prompt, position + 1) for position in range(span.begin, span.end)]


class ByPolicy:
    """A policy of positions, applied to what is read from the store.

    Args:
        rotary: the model's own rotation.
        policy: of all requests that do not bring one.
    """

    def __init__(self, rotary: Rotary, policy: Positions) -> None:
        self.rotary = rotary
        self.policy = policy

    def attend(
        self,
        module: nn.Module,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        work: Work,
        rule: Rule,
    ) -> Tensor:
        work.store.write(layer, key, value, work.ragged)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        for span in work.ragged.spans:
            first = first_seen(span.begin, rule.window)
            keys, values = work.store.read(layer, span, first)
            mine = query[:, span.rows]
            span.state.length = span.known
            if span.begin == 0 and layer not in span.begun:
                # Not again when it is computed anew: what was decided stays.
                span.begun.add(layer)
                self._begin(module, span, mine, keys, rule)
            mine = self._turn(module, span, mine, span.begin, keys=False)
            keys = self._turn(module, span, keys, first, keys=True)
            # A policy may have given every query head a key of its own.
            values = values.repeat_interleave(keys.shape[0] // values.shape[0], dim=0)
            out[span.rows] = attend(mine, keys, values, span.begin, rule).transpose(0, 1)
        return out

    def _turn(self, module: nn.Module, span: Span, x: Tensor, first: int, *, keys: bool) -> Tensor:
        positions = torch.arange(first, first + x.shape[1], device=x.device).unsqueeze(0)
        tokens = Tokens(self.rotary, positions, [span.state], keys=keys)
        return self._of(span).rotate(module, x.unsqueeze(0), tokens).squeeze(0)

    def _begin(self, module: nn.Module, span: Span, query: Tensor, key: Tensor, rule: Rule) -> None:
        seen = torch.ones(1, key.shape[1], dtype=torch.bool, device=key.device)
        if rule.window is not None:
            seen[:, : first_seen(span.end - 1, rule.window)] = False
        policy = self._of(span)
        policy.begin(module, query[None, :, -1:], key.unsqueeze(0), seen, [span.state])

    def _of(self, span: Span) -> Positions:
        return span.policy or self.policy
