"""Arithmetic of a training step, in the ways in which people count it."""

from __future__ import annotations

from core_fpdt.planning.job import Job
from core_fpdt.planning.shape import ModelShape


def pairs(tokens: int, window: int) -> float:
    """Pairs of a token and a key that it sees: itself and those before it, as far as the window.

    Example:
        >>> pairs(4, 0), pairs(4, 2)
        (10.0, 7.0)
    """
    seen = min(window or tokens, tokens)
    return seen * (seen + 1) / 2 + (tokens - seen) * seen


def attention(shape: ModelShape, tokens: int) -> float:
    """FLOP of attention over all layers, forwards: two products of width D for each pair."""
    by_window = (count * pairs(tokens, w) for w, count in shape.window_counts.items())
    return 4.0 * shape.query_width * sum(by_window)


def products(shape: ModelShape, tokens: int) -> float:
    """FLOP of all matrix products with weights, forwards, with the output head."""
    weights = shape.layers * shape.active_parameters + shape.head_parameters
    return 2.0 * weights * tokens


def model_flops(shape: ModelShape, tokens: int) -> float:
    """What a sequence needs: three times the forward pass, pairs that nobody sees left out.

    Nothing that is computed again counts. This is what "model FLOPs utilization" should mean (PaLM,
    arXiv 2204.02311), with causal attention counted as what it is, one half of the square.
    """
    return 3 * (products(shape, tokens) + attention(shape, tokens))


def logged_flops(shape: ModelShape, tokens: int) -> float:
    """What Megatron-DeepSpeed's log would count for a checkpointed run: 4 forward passes.

    Attention is the full square there, and the second forward pass counts as if it were needed; at
    long sequences that is 8/3 of :func:`model_flops`.
    """
    square = 4.0 * shape.layers * shape.query_width * float(tokens) ** 2
    return 4 * (products(shape, tokens) + square)


def executed_flops(job: Job) -> float:
    """What the devices compute for a sequence, with all that is computed again.

    Attention backwards takes five products where the model's count has four, as scores are made anew
    in every block.
    """
    shape, tokens = job.shape, job.sequence
    attended = 3.5 * attention(shape, tokens) + attention(shape, recomputed(job))
    layers = 2.0 * shape.layers * tokens * (4 * shape.active_parameters + projected(job))
    return attended + layers + 6.0 * shape.head_parameters * tokens


def recomputed(job: Job) -> int:
    """Tokens, from the first one on, whose attention is computed again in the backward pass."""
    return round((1 - job.kept) * job.sequence)


def projected(job: Job) -> int:
    """Parameters that tokens are multiplied with once more, beyond the one replay."""
    shape = job.shape
    once = shape.hidden * (shape.query_width + 2 * shape.key_width)
    return once * ((not job.settings.keep_keys) + (job.order == "key"))
