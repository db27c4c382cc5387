"""Beam search over any engine that tells the most likely tokens.

Every beam is a request for one token. What beams have in common lies in blocks that they share, so a
step computes little more than the last token of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.engines import Engine, Request, Sampling, Token
from core.errors import EngineError

MOST = 32
"""Beams at most: an engine tells no more than twice as many tokens."""


@dataclass(frozen=True)
class Beam:
    """A continuation of the prompt.

    Args:
        ids: token ids; the last one is a stop id where it ended with one.
        logprob: sum of their natural log-probabilities.
        score: that sum over the length to the power of the length penalty.
    """

    ids: tuple[int, ...]
    logprob: float
    score: float


@dataclass(frozen=True)
class _Search:
    beams: int
    stop_ids: frozenset[int]
    length_penalty: float
    early: bool

    def scored(self, ids: tuple[int, ...], logprob: float) -> Beam:
        return Beam(ids, logprob, logprob / len(ids) ** self.length_penalty)

    def best(self, found: Sequence[Beam]) -> list[Beam]:
        return sorted(found, key=lambda beam: -beam.score)[: self.beams]

    def settled(self, ended: Sequence[Beam], leading: Beam) -> bool:
        """Whether what goes on cannot become better than what has ended."""
        if len(ended) < self.beams:
            return False
        return self.early or ended[-1].score >= leading.score


def beam_search(
    engine: Engine,
    prompt: Sequence[int],
    beams: int,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> list[Beam]:
    """Find likely continuations, as ``model.generate(num_beams=...)`` does.

    Args:
        engine: an engine with nothing else queued.
        prompt: token ids.
        beams: how many are followed, and returned.
        max_new_tokens: tokens of a beam at most.
        stop_ids: tokens that end a beam.
        length_penalty: above 0 prefers longer ones.
        early_stopping: stop when as many beams have ended as are followed, instead of when nothing
            better can come at the present length.

    Returns:
        the beams, the best first.

    Raises:
        EngineError: for a number of beams that is out of range, a busy engine, or a prompt that the
            engine refuses.

    Example::

        best = beam_search(engine, [1, 2, 3], beams=4, max_new_tokens=16)[0]
    """
    if not 1 <= beams <= MOST:
        raise EngineError(f"{beams} beams are not in 1..{MOST}")
    if engine.busy:
        raise EngineError("a beam search wants the engine for itself", why="it is busy")
    search = _Search(beams, frozenset(stop_ids), length_penalty, early_stopping)
    going, ended = [Beam((), 0.0, 0.0)], list[Beam]()
    for _ in range(max_new_tokens):
        candidates = [
            search.scored((*beam.ids, token), beam.logprob + logprob)
            for beam, made in zip(going, _next(engine, prompt, going, 2 * beams), strict=True)
            for token, logprob in made.top[1:]
        ]
        candidates = sorted(candidates, key=lambda beam: -beam.logprob)[: 2 * beams]
        ends = [beam.ids[-1] in search.stop_ids for beam in candidates]
        # A beam that ends below all that are followed is not among the best ones.
        leading = zip(candidates[:beams], ends[:beams], strict=True)
        ended = search.best([*ended, *(beam for beam, end in leading if end)])
        going = [b for b, end in zip(candidates, ends, strict=True) if not end][:beams]
        if not going or search.settled(ended, going[0]):
            return ended
    return search.best([*ended, *going])


def _next(engine: Engine, prompt: Sequence[int], beams: Sequence[Beam], top: int) -> list[Token]:
    """The tokens that may follow each beam."""
    sampling = Sampling(max_new_tokens=1, top_logprobs=top)
    numbers = [
        engine.add(Request(prompt=[*prompt, *beam.ids], sampling=sampling)) for beam in beams
    ]
    made: dict[int, Token] = {}
    while engine.busy:
        made |= {token.request: token for token in engine.step()}
    failed = [number for number in numbers if made[number].finish == "error"]
    if failed:
        raise EngineError("a beam cannot go on", why="the engine failed to continue it")
    return [made[number] for number in numbers]
