"""The plain engine: the transformers model itself, one cache for each request."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.engines import EngineStats, FinishReason, Request, Token
from core.engines.common import check_request, evaluating, replace_weights
from core.engines.regimes import Regimes
from core.engines.sampling import Answer
from core.errors import EngineError
from core.identity import CacheIdentity, identity_of

if TYPE_CHECKING:
    from core.run import Run

logger = logging.getLogger("core")


@dataclass
class _Active:
    """A request that is being answered: its cache, its answer so far, and what runs next."""

    answer: Answer
    tokens: list[int]
    cache: Any = None
    cached: int = 0
    regime: tuple[int, ...] = ()
    cancelled: bool = False


class PlainEngine:
    """Runs every request through the model's own forward, with the model's own cache.

    The reference that faster engines are held against: any decoder that transformers can generate
    with, on any device, exact and unbatched.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._config: Any = getattr(model, "config", None)
        if not hasattr(self._config, "vocab_size") or not hasattr(model, "generate"):
            raise EngineError(
                f"{type(model).__name__} cannot be served",
                why="it is no causal language model of transformers",
            )
        self._ids = itertools.count(1)
        self._active: dict[int, _Active] = {}
        self._weights = 0
        self._passes = self._prompt_tokens = self._new_tokens = 0
        self._ended: Counter[FinishReason] = Counter()
        self._regimes = Regimes(model)

    @property
    def identity(self) -> CacheIdentity:
        """Everything that keys and values of this engine depend on."""
        return identity_of(self.model, str(self._weights))

    @property
    def busy(self) -> bool:
        return bool(self._active)

    def add(self, request: Request) -> int:
        check_request(self._config, request)
        number = next(self._ids)
        self._active[number] = _Active(Answer(request), list(request.prompt))
        return number

    def cancel(self, request: int) -> None:
        if request in self._active:
            self._active[request].cancelled = True

    def step(self) -> list[Token]:
        made = [self._try(number, active) for number, active in list(self._active.items())]
        for token in made:
            self._new_tokens += token.id >= 0
            if token.finish is not None:
                del self._active[token.request]
                self._ended[token.finish] += 1
        return made

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._active),
            kv_used=sum(active.cached for active in self._active.values()),
            passes=self._passes,
            prompt_tokens=self._prompt_tokens,
            new_tokens=self._new_tokens,
            ended=dict(self._ended),
        )

    def _try(self, number: int, active: _Active) -> Token:
        """A request whose forward pass fails ends with an error; the others go on."""
        try:
            return self._advance(number, active)
        except Exception:
            logger.exception("request %d failed", number)
            return Token(request=number, id=-1, finish="error", weights=self._weights)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        replace_weights(self.model, tensors)
        self.weights_changed()

    def weights_changed(self) -> None:
        self._weights += 1

    def close(self) -> None:
        self._active.clear()

    def __enter__(self) -> PlainEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _advance(self, number: int, active: _Active) -> Token:
        """Run one request by one token."""
        version = self._weights
        if active.cancelled:
            return Token(request=number, id=-1, finish="cancelled", weights=version)
        drawn = active.answer.draw(self._forward(active))
        active.tokens.append(drawn.id)
        return Token(request=number, weights=version, **drawn._asdict())

    def _forward(self, active: _Active) -> Tensor:
        """Logits of the last token, float32 on the CPU; the cache grows by all it did not hold."""
        regime = self._regimes.at(len(active.tokens))
        if regime != active.regime:
            # Keys of other frequencies, and all that later layers made of them, are of no use.
            active.cache, active.cached, active.regime = None, 0, regime
        device = next(self.model.parameters()).device
        ids = torch.tensor([active.tokens[active.cached :]], device=device)
        with evaluating(self.model):
            out = self.model(
                input_ids=ids, past_key_values=active.cache, use_cache=True, logits_to_keep=1
            )
        self._passes += 1
        if not active.answer.tokens:
            self._prompt_tokens += len(active.tokens)
        active.cache, active.cached = out.past_key_values, len(active.tokens)
        logits: Tensor = out.logits[0, -1].float().cpu()
        return logits


def build(model: nn.Module, run: Run) -> PlainEngine:
    """Build the plain engine on a live module."""
    return PlainEngine(model)
