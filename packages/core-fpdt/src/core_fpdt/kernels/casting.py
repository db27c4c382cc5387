"""Dtypes of blocks: what kernels need to be alike, and what is added up in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are added up in: float32, and float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def same_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in one dtype, that of the narrowest of them.

    Under autocast rotary positions leave queries and keys in float32 while values are what a
    projection made, and operators below autograd do not cast. Where widths are equal, as of float16
    and bfloat16, values decide.

    Args:
        query: of any shape and float dtype.
        key: as queries.
        value: as queries.
    """
    narrow = min((value.dtype, query.dtype, key.dtype), key=lambda dtype: dtype.itemsize)
    return query.to(narrow), key.to(narrow), value.to(narrow)
