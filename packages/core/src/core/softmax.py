"""Attention in parts: the output with its log-sum-exp, and the exact merge of such parts.

Softmax over a long row of keys can be computed piece by piece, because every piece can say how much
of the row's weight it holds. Chunked sequences, a prefix and its tail, and two-stream attention all
need exactly this, so it is kept here once. Everything accumulates in float32 (float64 for float64
inputs): a running merge in bfloat16 loses a digit with every part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ACCUMULATORS = (torch.float32, torch.float64)
"""The only types a log-sum-exp may have."""


class Partial(NamedTuple):
    """Attention of queries over some of their keys.

    Args:
        output: (B, H, Tq, Dv); zero in rows that see no key.
        lse: (B, H, Tq) log of the sum of the exponentials of the scores; float32 (float64 for
            float64 inputs), ``-inf`` in rows that see no key.
    """

    output: Tensor
    lse: Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Partial:
    """Attend and keep the log-sum-exp: the reference path, on any device and in any dtype.

    Args:
        query: (B, H, Tq, D).
        key: (B, Hkv, Tk, D); Hkv divides H, and query head ``h`` reads key head ``h // (H / Hkv)``.
        value: (B, Hkv, Tk, Dv).
        mask: broadcastable to (B, H, Tq, Tk); boolean (true means visible) or added to the scores,
            where only ``-inf`` hides a key completely.
        scale: factor of the scores; ``1 / sqrt(D)`` by default.

    Returns:
        The output in float32 (float64 for float64 inputs), so that it can be merged; cast it once,
        at the end. A row that sees no key has output 0 and lse ``-inf``; its gradients are 0.

    Raises:
        ValueError: for shapes that do not fit together.

    Example:
        >>> query = torch.zeros(1, 2, 1, 4)
        >>> key = value = torch.ones(1, 1, 3, 4)
        >>> output, lse = attend(query, key, value)
        >>> output.shape, round(lse[0, 0, 0].exp().item(), 4)
        (torch.Size([1, 2, 1, 4]), 3.0)
    """
    _check_shapes(query, key, value)
    accumulator = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, width = query.shape
    factor: float = width**-0.5 if scale is None else scale
    groups = heads // key.shape[1]
    grouped = query.to(accumulator).reshape(batch, key.shape[1], groups * length, width)
    scores = (grouped @ key.to(accumulator).transpose(-1, -2) * factor).view(
        batch, heads, length, key.shape[2]
    )
    scores = _masked(scores, mask)
    top = _top(scores)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    grouped = weights.view(batch, key.shape[1], groups * length, key.shape[2])
    output = (grouped @ value.to(accumulator)).view(batch, heads, length, value.shape[3])
    return Partial(output, (_log(total) + top).squeeze(-1))


def merge(*parts: Partial) -> Partial:
    """Merge attention over disjoint sets of keys into attention over all of them. Exact.

    Args:
        parts: results over the same queries; what a part holds in a row without a visible key
            (lse ``-inf``) is ignored, whatever a kernel left there.

    Returns:
        Output and lse in float32, or float64 when any lse is float64. The output is never rounded
        to the dtype of a part's output: cast it once, after the last merge.

    Raises:
        ValueError: for no part, or parts of different shapes.
        TypeError: for an lse that is neither float32 nor float64.

    Example:
        >>> query, key, value = torch.rand(3, 1, 2, 6, 4, dtype=torch.float64)
        >>> whole = attend(query, key, value)
        >>> left = attend(query, key[:, :, :2], value[:, :, :2])
        >>> right = attend(query, key[:, :, 2:], value[:, :, 2:])
        >>> torch.allclose(merge(left, right).output, whole.output)
        True
    """
    _check_parts(parts)
    accumulator = torch.float32
    for part in parts:
        accumulator = torch.promote_types(accumulator, part.lse.dtype)
    lses = torch.stack([part.lse.to(accumulator) for part in parts], dim=-1)
    top = _top(lses)
    weights = (lses - top).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    output = torch.zeros_like(parts[0].output, dtype=accumulator)
    for part, weight in zip(parts, weights.unbind(-1), strict=True):
        # Not weight * output alone: 0 * NaN is NaN, and kernels leave anything in empty rows.
        hidden = (part.lse == -torch.inf).unsqueeze(-1)
        output = output + weight.unsqueeze(-1) * part.output.to(accumulator).masked_fill(hidden, 0)
    return Partial(output, (_log(total) + top).squeeze(-1))


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(scores.dtype)


def _top(scores: Tensor) -> Tensor:
    """Largest score of every row as a constant; 0 where nothing is visible.

    Detached: it cancels out of the result, and its gradient in rows of ``-inf`` would be NaN.
    """
    if scores.shape[-1] == 0:
        return scores.new_zeros((*scores.shape[:-1], 1))
    top = scores.detach().amax(-1, keepdim=True)
    return torch.where(top == -torch.inf, 0.0, top)


def _log(total: Tensor) -> Tensor:
    """Logarithm whose gradient at 0 is 0, not NaN."""
    empty = total == 0
    return torch.where(empty, 1.0, total).log().masked_fill(empty, -torch.inf)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError("query, key and value must be (batch, heads, tokens, width)")
    same = key.shape[:3] == value.shape[:3] and query.shape[0] == key.shape[0]
    if not same or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        raise ValueError(f"query, key and value do not fit together: {shapes}")


def _check_parts(parts: tuple[Partial, ...]) -> None:
    if not parts:
        raise ValueError("merge needs at least one part")
    for part in parts:
        if part.lse.dtype not in ACCUMULATORS:
            raise TypeError(f"the lse of a part must be float32 or float64, not {part.lse.dtype}")
        if part.lse.shape != part.output.shape[:-1] or part.output.shape != parts[0].output.shape:
            shapes = ", ".join(f"{tuple(p.output.shape)}/{tuple(p.lse.shape)}" for p in parts)
            raise ValueError(f"the parts differ in shape (output/lse): {shapes}")
