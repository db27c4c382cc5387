"""The plain engine: the transformers model itself, one cache for each request."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.engines import FinishReason, Request, Token
from core.engines.sampling import draw
from core.errors import EngineError
from core.identity import CacheIdentity

if TYPE_CHECKING:
    from core.run import Run


@dataclass
class _Active:
    """A request that is being answered: its cache, its generator, and what runs next."""

    request: Request
    generator: torch.Generator
    cache: Any = None
    pending: list[int] = field(default_factory=list)
    made: int = 0
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

    @property
    def identity(self) -> CacheIdentity:
        """Everything that keys and values of this engine depend on."""
        return CacheIdentity(weights=str(self._weights))

    def add(self, request: Request) -> int:
        self._check(request)
        generator = torch.Generator().manual_seed(request.sampling.seed)
        active = _Active(request, generator, pending=list(request.prompt))
        number = next(self._ids)
        self._active[number] = active
        return number

    def cancel(self, request: int) -> None:
        if request in self._active:
            self._active[request].cancelled = True

    def step(self) -> list[Token]:
        made = [self._advance(number, active) for number, active in list(self._active.items())]
        for token in made:
            if token.finish is not None:
                del self._active[token.request]
        return made

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        given = dict(tensors)
        for name, tensor in given.items():
            if name not in own:
                raise EngineError(f"the model has no weight {name!r}")
            if own[name].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)}, not {tuple(own[name].shape)}"
                raise EngineError(f"the weight {name!r} has the shape {shapes}")
        with torch.no_grad():
            for name, tensor in given.items():
                own[name].copy_(tensor)
        self._weights += 1

    def close(self) -> None:
        self._active.clear()

    def __enter__(self) -> PlainEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, request: Request) -> None:
        prompt, longest = request.prompt, getattr(self._config, "max_position_embeddings", None)
        if not prompt:
            raise EngineError("the prompt is empty", fix="give at least one token")
        wrong = [i for i in prompt if not 0 <= i < self._config.vocab_size]
        if wrong:
            raise EngineError(f"token {wrong[0]} is not in 0..{self._config.vocab_size - 1}")
        new = request.sampling.max_new_tokens
        if longest is not None and len(prompt) + new > longest:
            raise EngineError(
                f"{len(prompt)} prompt tokens and {new} new ones do not fit",
                why=f"the model holds {longest}",
            )
        if request.extras:
            raise EngineError(f"the plain engine does not know {', '.join(request.extras)}")

    def _advance(self, number: int, active: _Active) -> Token:
        """Run one request by one token."""
        if active.cancelled:
            return Token(request=number, id=-1, finish="cancelled", weights=self._weights)
        logits = self._forward(active)
        if not torch.isfinite(logits).all():
            return Token(request=number, id=-1, finish="error", weights=self._weights)
        token, logprob = draw(logits, active.request.sampling, active.generator)
        active.pending = [token]
        active.made += 1
        finish: FinishReason | None = None
        if token in active.request.sampling.stop_ids:
            finish = "stop"
        elif active.made >= active.request.sampling.max_new_tokens:
            finish = "length"
        return Token(
            request=number, id=token, logprob=logprob, finish=finish, weights=self._weights
        )

    def _forward(self, active: _Active) -> Tensor:
        """Logits of the last pending token, float32 on the CPU; the cache grows by all of them."""
        device = next(self.model.parameters()).device
        ids = torch.tensor([active.pending], device=device)
        with _evaluating(self.model), torch.no_grad():
            out = self.model(
                input_ids=ids, past_key_values=active.cache, use_cache=True, logits_to_keep=1
            )
        active.cache = out.past_key_values
        logits: Tensor = out.logits[0, -1].float().cpu()
        return logits


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Without dropout; modules that were training go on doing so afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def build(model: nn.Module, run: Run) -> PlainEngine:
    """Build the plain engine on a live module."""
    return PlainEngine(model)
