"""Scales that make the error of rounding small, instead of those that fit the largest magnitudes.

A floating grid looks the same at twice the scale as long as nothing leaves its range, so what there
is to gain lies within one octave: a little below the usual scale (the largest weights are cut off,
the others get finer steps) up to almost twice of it (where the crowded part of the weights may meet
finer steps). For E3M2 most of the gain lies above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from core_fp6.weights.scaling import Scheme, grouped, require_finite

_STEPS = torch.logspace(math.log2(0.8), math.log2(1.8), 32, base=2.0).tolist()
"""Candidates, as multiples of the usual scale."""
_CHUNK = 1 << 20
"""Weights that are searched at a time."""


def search(
    weight: Tensor, scheme: Scheme, importance: Tensor | None = None, name: str = "weight"
) -> Tensor:
    """Scales of the least squared error, found by trying multiples of those of round-to-nearest.

    Never worse than round-to-nearest in that error, row by row and group by group. The same input
    gives the same scales.

    Args:
        weight: ``[..., rows, columns]``, float16, bfloat16 or float32.
        scheme: format and group size.
        importance: what a squared error counts in each column, ``[..., columns]`` and at least
            zero: the mean squared input of the column is its share in the error of the layer's
            output (the diagonal of the Hessian, as in GPTQ, arXiv 2210.17323). None: the same.
        name: what errors call the weight.

    Returns:
        scales as :meth:`Scheme.scales` gives them, in their stored dtype.

    Raises:
        ModelError: when the weight has NaN or infinities.
        ValueError: when ``importance`` has another shape.
    """
    require_finite(weight, name)
    at_a_time = max(1, _CHUNK // weight.shape[-1])
    found = [
        _search(rows, scheme, counts)
        for matrix, counts in matrices(weight, importance)
        for rows in torch.split(matrix, at_a_time)
    ]
    return torch.cat(found).reshape(scheme.scale_shape(weight.shape))


def matrices(
    weight: Tensor, importance: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each matrix ``[rows, columns]`` of a weight, with what errors count in its columns.

    Raises:
        ValueError: when ``importance`` is not of shape ``[..., columns]``.
    """
    expected = torch.Size((*weight.shape[:-2], weight.shape[-1]))
    if importance is not None and importance.shape != expected:
        found = f"an importance of shape {list(importance.shape)}"
        raise ValueError(f"{found} for a weight of shape {list(weight.shape)}")
    flat = weight.reshape(-1, *weight.shape[-2:])
    if importance is None:
        return ((matrix, None) for matrix in flat)
    columns = importance.to(weight.device, torch.float32).reshape(len(flat), -1)
    return zip(flat, columns, strict=True)


def _search(rows: Tensor, scheme: Scheme, importance: Tensor | None) -> Tensor:
    usual = scheme.scales(rows)
    tiny = torch.finfo(usual.dtype).tiny
    best, least = usual, _errors(rows, scheme, usual, importance)
    for step in _STEPS:
        scale = (usual.float() * step).to(usual.dtype).clamp(min=tiny)
        errors = _errors(rows, scheme, scale, importance)
        better = errors < least
        best, least = torch.where(better, scale, best), torch.where(better, errors, least)
    return best


def _errors(rows: Tensor, scheme: Scheme, scale: Tensor, importance: Tensor | None) -> Tensor:
    """Squared error of what each scale is for, in the shape of the scales."""
    codes, _ = scheme.encode(rows, scale)
    squared = (scheme.decode(codes, scale) - rows.float()).square()
    if importance is not None:
        squared *= importance
    return grouped(squared, scheme).sum(-1).view(scale.shape)
