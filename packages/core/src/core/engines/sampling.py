"""Drawing tokens from logits: one at a time, for one answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from core.engines import FinishReason, Request, Sampling
from core.errors import EngineError

_NOT_FINITE = "the model's logits are not finite"


class Drawn(NamedTuple):
    """A token of an answer; the fields are those of :class:`core.engines.Token`."""

    id: int
    logprob: float
    finish: FinishReason | None
    top: tuple[tuple[int, float], ...]


class Answer:
    """The answer to one request as it grows: draws its tokens, and tells when it ends.

    Has a generator of its own, so that what it draws does not depend on other requests.

    Args:
        request: what was asked.

    Example::

        answer = Answer(request)
        drawn = answer.draw(logits)
    """

    def __init__(self, request: Request) -> None:
        self.sampling = request.sampling
        self.tokens: list[int] = []
        self._prompt = request.prompt
        self._constraint = request.constraint
        self._generator = torch.Generator().manual_seed(request.sampling.seed)
        self._counts: Counter[int] = Counter()

    @property
    def greedy(self) -> bool:
        """Whether nothing but the largest logit decides."""
        sampling = self.sampling
        return (
            sampling.temperature == 0
            and self._constraint is None
            and sampling.top_logprobs < 0
            and sampling.repetition_penalty == 1
            and not (sampling.presence_penalty or sampling.frequency_penalty)
            and not (sampling.logit_bias or len(self.tokens) < sampling.min_new_tokens)
        )

    def draw(self, logits: Tensor) -> Drawn:
        """Draw the next token.

        Args:
            logits: (vocabulary,), float32, on the CPU; left as they are.

        Raises:
            EngineError: for logits that are not finite, and where nothing may come next.
        """
        if not bool(torch.isfinite(logits).all()):
            raise EngineError(_NOT_FINITE)
        sampling, own = self.sampling, logits
        logits = self._allowed(self._penalized(logits))
        token, logprob = draw(logits, sampling, self._generator)
        if not logits[token] > -torch.inf:
            raise EngineError("no token may come next", why="the constraint allows none")
        return self.take(token, logprob, top_logprobs(own, token, sampling.top_logprobs))

    def take(self, token: int, logprob: float, top: tuple[tuple[int, float], ...] = ()) -> Drawn:
        """Note what was drawn elsewhere."""
        self.tokens.append(token)
        self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        finish = finish_reason(self.sampling, token, len(self.tokens))
        return Drawn(token, logprob, finish, top)

    def _penalized(self, logits: Tensor) -> Tensor:
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            seen = _ids([*self._prompt, *self._counts])
            old = logits[seen]
            factor = sampling.repetition_penalty
            logits = logits.index_put((seen,), torch.where(old > 0, old / factor, old * factor))
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            times = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            less = sampling.presence_penalty + sampling.frequency_penalty * times
            logits = logits.index_add(0, _ids(list(self._counts)), -less)
        if sampling.logit_bias:
            bias = torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype)
            logits = logits.index_add(0, _ids(list(sampling.logit_bias)), bias)
        return logits

    def _allowed(self, logits: Tensor) -> Tensor:
        if self._constraint is not None:
            logits = logits.masked_fill(~self._constraint.allowed(), -torch.inf)
        if len(self.tokens) < self.sampling.min_new_tokens and self.sampling.stop_ids:
            logits = logits.index_fill(0, _ids(self.sampling.stop_ids), -torch.inf)
        return logits


def draw_each(logits: Tensor, answers: Sequence[Answer]) -> list[Drawn | Exception]:
    """Draw the next token of many answers; those that are greedy at once, where the logits are.

    Args:
        logits: (R, vocabulary), of any floating dtype, on any device.
        answers: whose rows these are.

    Returns:
        what :meth:`Answer.draw` returns or raises for each.
    """
    found: dict[int, Drawn | Exception] = {}
    plain = [index for index, answer in enumerate(answers) if answer.greedy]
    if plain:
        rows = logits[torch.tensor(plain, device=logits.device)].float()
        best = rows.max(dim=-1)
        figures = torch.stack([best.values, rows.logsumexp(-1), rows.isfinite().all(-1).float()])
        tokens, (values, sums, finite) = best.indices.tolist(), figures.tolist()
        for place, index in enumerate(plain):
            found[index] = (
                answers[index].take(tokens[place], values[place] - sums[place])
                if finite[place]
                else EngineError(_NOT_FINITE)
            )
    for index, answer in enumerate(answers):
        if index not in found:
            found[index] = _drawn(answer, logits[index].float().cpu())
    return [found[index] for index in range(len(answers))]


def _drawn(answer: Answer, logits: Tensor) -> Drawn | Exception:
    try:
        return answer.draw(logits)
    except Exception as error:  # also of a constraint, which is somebody else's
        return error


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, float]:
    """Draw a token by temperature, ``top_k``, ``top_p`` and ``min_p``.

    Args:
        logits: (vocabulary,), float32, on the CPU.
        sampling: how to draw.
        generator: the request's own CPU generator.

    Returns:
        the token id, and its log-probability under the distribution it was drawn from (for greedy
        decoding: under the untempered softmax).
    """
    if sampling.temperature == 0:
        token = int(logits.argmax())
        return token, float(logits.log_softmax(-1)[token])
    scores = _top(logits / sampling.temperature, sampling.top_k)
    scores = _likely(_nucleus(scores, sampling.top_p), sampling.min_p)
    logprobs = scores.log_softmax(-1)
    token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
    return token, float(logprobs[token])


def finish_reason(sampling: Sampling, token: int, made: int) -> FinishReason | None:
    """Return why an answer ends with its newest token, or ``None`` while it goes on.

    Args:
        sampling: of the request.
        token: the newest token's id.
        made: number of tokens made so far, with this one.

    Example:
        >>> finish_reason(Sampling(max_new_tokens=2, stop_ids=(7,)), 7, 1)
        'stop'
        >>> finish_reason(Sampling(max_new_tokens=2), 7, 2)
        'length'
    """
    if token in sampling.stop_ids:
        return "stop"
    return "length" if made >= sampling.max_new_tokens else None


def top_logprobs(logits: Tensor, token: int, count: int) -> tuple[tuple[int, float], ...]:
    """Return ``(id, log-probability)`` of a token and of the most likely ones; none for -1.

    Args:
        logits: (vocabulary,) the model's own.
        token: the token that comes first, whatever its rank.
        count: how many of the most likely ones follow.
    """
    if count < 0:
        return ()
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(count, logprobs.numel()))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return ((token, float(logprobs[token])), *pairs)


def _ids(ids: Sequence[int]) -> Tensor:
    return torch.tensor(sorted(set(ids)) if len(set(ids)) < len(ids) else list(ids))


def _top(scores: Tensor, count: int) -> Tensor:
    if not 0 < count < scores.numel():
        return scores
    smallest = scores.topk(count).values[-1]
    return scores.masked_fill(scores < smallest, -torch.inf)


def _nucleus(scores: Tensor, mass: float) -> Tensor:
    if mass >= 1:
        return scores
    ordered, index = scores.sort(descending=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.empty_like(before, dtype=torch.bool)
    dropped[index] = before >= mass
    return scores.masked_fill(dropped, -torch.inf)


def _likely(scores: Tensor, share: float) -> Tensor:
    if share <= 0:
        return scores
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < share * probabilities.max(), -torch.inf)
