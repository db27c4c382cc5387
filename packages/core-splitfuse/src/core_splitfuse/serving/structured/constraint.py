"""What llguidance allows next, as core's engines ask for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from core.errors import EngineError


class GrammarConstraint:
    """Holds one answer to a grammar. Implements :class:`core.Constraint`.

    Args:
        matcher: at the start of its grammar; belongs to this answer.
        vocabulary: width of the model's logits.
        stop_ids: token ids that end the answer; allowed where the grammar may end.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int, stop_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._stop_ids = [token for token in stop_ids if token < vocabulary]

    def allowed(self) -> Tensor:
        """(vocabulary,) bool on the CPU: the tokens that may come next, at least one.

        Raises:
            EngineError: when the grammar became too complex, and when no token can go on with it.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(np.bool_)
        if self._matcher.is_error():
            raise EngineError("the grammar cannot go on", why=self._reason())
        if self._matcher.is_accepting():
            mask[self._stop_ids] = True
        if not mask.any():
            raise EngineError("no token can go on with the grammar")
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        """Take note of the token that came.

        Raises:
            EngineError: for a token that was not allowed.
        """
        if token in self._stop_ids and self._matcher.is_accepting():
            return  # The answer has ended; the grammar need not know of every such token.
        if not self._matcher.consume_token(token):
            raise EngineError(f"token {token} does not fit the grammar", why=self._reason())

    def _reason(self) -> str:
        return self._matcher.get_error().partition("\n")[0]
