"""Drawing one token from logits."""

from __future__ import annotations

import torch
from torch import Tensor

from core.engines import Sampling


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, float]:
    """Draw a token.

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
    scores = _nucleus(_top(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    logprobs = scores.log_softmax(-1)
    token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
    return token, float(logprobs[token])


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
