"""The engine contract: requests in, tokens out, one step at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from annotated_types import Ge, Gt, Le

from core.contributions import Settings
from core.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Settings):
    """Which engine generates."""

    name: str = "auto"
    """Name of an engine, or ``auto`` for the preferred one that is installed."""


@dataclass(frozen=True, kw_only=True)
class Sampling(Settings):
    """How tokens are drawn. The default is greedy.

    Sampling draws in float32 from one generator per request, so a request's tokens do not depend on
    what else is in the batch.
    """

    max_new_tokens: Annotated[int, Ge(1)] = 64
    """Tokens to generate at most."""

    temperature: Annotated[float, Ge(0)] = 0.0
    """0 takes the most likely token; otherwise logits are divided by it."""

    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Keep the most likely tokens whose probabilities sum up to this."""

    top_k: Annotated[int, Ge(0)] = 0
    """Keep this many of the most likely tokens; 0 keeps all."""

    seed: int = 0
    """Seed of the request's generator."""

    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; the id itself is returned as the last token."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    Args:
        prompt: token ids, at least one.
        sampling: how tokens are drawn.
        extras: what a particular engine understands beyond this; unknown names are refused.
    """

    prompt: Sequence[int]
    sampling: Sampling = Sampling()
    extras: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token that an engine made for one request.

    Args:
        request: id that ``add`` returned.
        id: token id; -1 when a request ends without a further token.
        logprob: natural log-probability under the distribution it was drawn from, in float32.
        finish: why the request ended with this token, or ``None`` while it goes on.
        weights: version of the weights that made it.
    """

    request: int
    id: int
    logprob: float = 0.0
    finish: FinishReason | None = None
    weights: int = 0


class Engine(Protocol):
    """Generates tokens for many requests at once.

    An engine is built on a live module and copies no parameter: when training changes the module,
    the next step of the engine uses the changed weights. ``run.engine`` tells it of every step of
    an optimizer over its module; an engine that refuses a model leaves it as it was.

    Example::

        engine = run.engine(model)
        first = engine.add(Request(prompt=[1, 2, 3]))
        while tokens := engine.step():
            for token in tokens:
                print(token.request, token.id, token.finish)
        engine.close()
    """

    def add(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            EngineError: for a prompt that is empty, too long, or holds unknown token ids.
        """
        ...

    def cancel(self, request: int) -> None:
        """End a request with the finish reason ``cancelled``; unknown ids are fine."""

    def step(self) -> list[Token]:
        """Run the model once, and return the tokens it made; empty when there is nothing to do."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights by name and raise the version that tokens carry.

        Raises:
            EngineError: for an unknown name or another shape; nothing is changed then.
        """

    def weights_changed(self) -> None:
        """Note that the module's weights were changed in place: raise the version of tokens.

        Core calls it after optimizer steps; whoever writes weights in another way calls it too.
        """

    def close(self) -> None:
        """Give back everything, and leave the module as it was before the engine was built."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to one prompt.

    Args:
        ids: generated token ids.
        logprobs: their natural log-probabilities.
        finish: why it ended.
        weights: version of the weights of each token.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    weights: tuple[int, ...]


def generate(
    engine: Engine, prompts: Iterable[Sequence[int] | Request], sampling: Sampling | None = None
) -> list[Completion]:
    """Answer prompts with any engine, in the order given.

    Args:
        engine: an engine with nothing else queued.
        prompts: token ids of each prompt, or requests that bring their own sampling.
        sampling: for all prompts that are no requests; greedy unless given.

    Raises:
        EngineError: when the engine stops before all requests have ended.

    Example::

        drawn = [Sampling(temperature=1.0, seed=seed) for seed in range(4)]
        answers = generate(engine, [Request(prompt=[1, 2, 3], sampling=s) for s in drawn])
    """
    wanted = sampling or Sampling()
    requests = [
        prompt if isinstance(prompt, Request) else Request(prompt=prompt, sampling=wanted)
        for prompt in prompts
    ]
    order = _add_all(engine, requests)
    tokens: dict[int, list[Token]] = {request: [] for request in order}
    while made := engine.step():
        for token in made:
            tokens.setdefault(token.request, []).append(token)
    return [_complete(request, tokens[request]) for request in order]


def _add_all(engine: Engine, requests: Sequence[Request]) -> list[int]:
    """Queue all requests; when one is refused, none of the others stays behind."""
    order: list[int] = []
    try:
        order.extend(engine.add(request) for request in requests)
    except EngineError:
        for number in order:
            engine.cancel(number)
        while engine.step():
            pass
        raise
    return order


def _complete(request: int, tokens: Sequence[Token]) -> Completion:
    if not tokens or tokens[-1].finish is None:
        raise EngineError(f"request {request} did not end", why="the engine made no more tokens")
    kept = [token for token in tokens if token.id >= 0]
    return Completion(
        ids=tuple(token.id for token in kept),
        logprobs=tuple(token.logprob for token in kept),
        finish=tokens[-1].finish,
        weights=tuple(token.weights for token in kept),
    )
