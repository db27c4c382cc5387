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

    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    """Drop tokens that are less likely than this share of the most likely one; 0 drops none."""

    repetition_penalty: Annotated[float, Gt(0)] = 1.0
    """Divide positive logits of tokens of prompt and answer by this, and multiply negative ones."""

    presence_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    """Subtract this from the logit of every token that the answer holds."""

    frequency_penalty: Annotated[float, Ge(-2), Le(2)] = 0.0
    """Subtract this for every time that the answer holds a token."""

    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """Added to the logits of these token ids."""

    stop_ids: tuple[int, ...] = ()
    """Token ids that end the answer; the id itself is returned as the last token."""

    min_new_tokens: Annotated[int, Ge(0)] = 0
    """Tokens to generate before a stop id may come."""

    top_logprobs: Annotated[int, Ge(-1), Le(64)] = -1
    """How many of the most likely tokens to tell with every token; -1 tells nothing of the kind."""


class Constraint(Protocol):
    """What an answer may consist of, such as a grammar: which token may come next.

    Belongs to one request, and is asked in the order of its tokens.

    Example::

        class OnlyDigits:
            def __init__(self, digits): self.mask = digits  # (vocabulary,) bool
            def allowed(self): return self.mask
            def accept(self, token): pass
    """

    def allowed(self) -> Tensor:
        """(vocabulary,) bool on the CPU: the tokens that may come next, at least one."""
        ...

    def accept(self, token: int) -> None:
        """Take note of the token that came."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it.

    Args:
        prompt: token ids, at least one.
        sampling: how tokens are drawn.
        constraint: what the answer may consist of; used up by one request.
        extras: what a particular engine understands beyond this; unknown names are refused.
    """

    prompt: Sequence[int]
    sampling: Sampling = Sampling()
    constraint: Constraint | None = None
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
        top: with ``top_logprobs``: this token and then the most likely ones, each with its
            log-probability under the model's own distribution, before anything else was applied.
    """

    request: int
    id: int
    logprob: float = 0.0
    finish: FinishReason | None = None
    weights: int = 0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine is doing, and what it has done since it was built.

    Args:
        running: requests that are being computed.
        waiting: requests that are queued.
        kv_used: tokens of which keys and values are held for running requests.
        kv_total: tokens of which they can be held; 0 where nothing but memory limits it.
        passes: forward passes.
        prompt_tokens: tokens of prompts that were computed, or taken from a cache.
        new_tokens: tokens that were generated.
        reused_tokens: those of the prompts that were taken from a cache.
        evictions: times that a request gave up its keys and values to be computed anew.
        ended: requests by finish reason.
    """

    running: int = 0
    waiting: int = 0
    kv_used: int = 0
    kv_total: int = 0
    passes: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0
    evictions: int = 0
    ended: Mapping[FinishReason, int] = field(default_factory=dict["FinishReason", int])


class Engine(Protocol):
    """Generates tokens for many requests at once.

    An engine is built on a live module and copies no parameter: when training changes the module,
    the next step of the engine uses the changed weights. ``run.engine`` tells it of every step of
    an optimizer over its module; an engine that refuses a model leaves it as it was.

    Example::

        engine = run.engine(model)
        first = engine.add(Request(prompt=[1, 2, 3]))
        while engine.busy:
            for token in engine.step():
                print(token.request, token.id, token.finish)
        engine.close()
    """

    @property
    def busy(self) -> bool:
        """Whether a request is queued or running, so that :meth:`step` has something to do."""
        ...

    def add(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            EngineError: for a prompt that is empty, too long, or holds unknown token ids.
        """
        ...

    def cancel(self, request: int) -> None:
        """End a request with the finish reason ``cancelled``; unknown ids are fine."""

    def step(self) -> list[Token]:
        """Run the model once, and return the tokens it made.

        None with nothing to do, and where the pass only took a part of a prompt.
        """
        ...

    def stats(self) -> EngineStats:
        """What the engine is doing."""
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
    while engine.busy:
        for token in engine.step():
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
        while engine.busy:
            engine.step()
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
