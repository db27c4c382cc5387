"""Launches of the kernels; importing it needs Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.softmax import Partial
from core_fpdt.kernels.contract import Gradients, Scores
from core_fpdt.kernels.triton.backward import key_kernel, query_kernel
from core_fpdt.kernels.triton.forward import forward_kernel
from core_fpdt.kernels.triton.language import INTERPRETED, OPTIONS, made_current
from core_fpdt.kernels.triton.sizes import (
    Sizes,
    forward_sizes,
    key_sizes,
    power_of_two,
    query_sizes,
)
from core_fpdt.masks.tiles import Kind, Tile


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which needs no device."""
    return bool(INTERPRETED.value)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tile: Tile,
    scores: Scores,
    running: Partial | None = None,
) -> Partial:
    """Attend within a block, and merge into ``running`` if there is one.

    Args:
        query: (B, H, Tq, D) in float32, bfloat16 or float16.
        key: (B, Hkv, Tk, D).
        value: (B, Hkv, Tk, Dv).
        tile: who sees whom.
        scores: how scores are made.
        running: attention of the same queries over other keys.

    Returns:
        Output and lse in float32.
    """
    query, key, value = (_dense(x) for x in (query, key, value))
    output = query.new_empty((*query.shape[:3], value.shape[3]), dtype=torch.float32)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    # Pointers that a kernel does not read must be some all the same.
    old = (output, lse) if running is None else (x.contiguous() for x in running)
    mask, strides = _mask(tile, query)
    known = _constants(query, key, value, tile, scores)
    sizes = forward_sizes(max(known["WIDTH"], known["VALUE_WIDTH"]), query.element_size())
    with made_current(query):
        forward_kernel[_grid(query.shape[2], sizes.rows, query)](
            query,
            key,
            value,
            mask,
            *old,
            output,
            lse,
            *_numbers(scores, query, key),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *strides,
            MERGED=running is not None,
            **known,
            **_options(sizes),
        )
    return Partial(output, lse)


def differentiate(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    lse: Tensor,
    tile: Tile,
    scores: Scores,
) -> Gradients:
    """Gradients of a block, in float32.

    Args:
        grad: (B, H, Tq, Dv) gradient of the merged output.
        query: as in :func:`attend`.
        key: as in :func:`attend`.
        value: as in :func:`attend`.
        delta: (B, H, Tq) float32 sums of ``grad * output`` of the whole rows.
        lse: (B, H, Tq) float32 of the whole rows.
        tile: who sees whom.
        scores: how scores are made.
    """
    grad, query, key, value = (_dense(x) for x in (grad, query, key, value))
    made = Gradients(*(x.new_empty(x.shape, dtype=torch.float32) for x in (query, key, value)))
    mask, strides = _mask(tile, query)
    known = _constants(query, key, value, tile, scores)
    widest = max(known["WIDTH"], known["VALUE_WIDTH"]), query.element_size()
    inputs = grad, query, key, value, mask, lse.contiguous(), delta.contiguous()
    numbers = (
        *_numbers(scores, query, key),
        *(stride for x in (grad, query, key, value) for stride in x.stride()[:3]),
        *strides,
    )
    with made_current(query):
        sizes = key_sizes(*widest)
        key_kernel[_grid(key.shape[2], sizes.columns, key)](
            *inputs, made.key, made.value, *numbers, **known, **_options(sizes)
        )
        sizes = query_sizes(*widest)
        query_kernel[_grid(query.shape[2], sizes.rows, query)](
            *inputs, made.query, *numbers, **known, **_options(sizes)
        )
    return made


def _constants(
    query: Tensor, key: Tensor, value: Tensor, tile: Tile, scores: Scores
) -> dict[str, Any]:
    """What all kernels are compiled for."""
    return {
        "HEADS": query.shape[1],
        "GROUP": query.shape[1] // key.shape[1],
        "DIM": query.shape[3],
        "VALUE_DIM": value.shape[3],
        "WIDTH": power_of_two(query.shape[3]),
        "VALUE_WIDTH": power_of_two(value.shape[3]),
        "CAUSAL": tile.kind is Kind.CAUSAL,
        "MASKED": tile.kind is Kind.PARTIAL,
        "SOFTCAP": scores.softcap is not None,
        # Single precision as it is meant; matrix units would round to ten bits.
        "PRECISION": "ieee" if query.element_size() > 2 else "tf32",
    }


def _numbers(scores: Scores, query: Tensor, key: Tensor) -> tuple[float, float, int, int]:
    return float(scores.scale), float(scores.softcap or 1), query.shape[2], key.shape[2]


def _options(sizes: Sizes) -> dict[str, Any]:
    return {
        "ROWS": sizes.rows,
        "COLUMNS": sizes.columns,
        "num_warps": sizes.warps,
        "num_stages": sizes.stages,
        **OPTIONS,
    }


def _grid(tokens: int, size: int, tensor: Tensor) -> tuple[int, int]:
    return -(-tokens // size), tensor.shape[0] * tensor.shape[1]


def _mask(tile: Tile, query: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Bytes of a mask, and strides that are 0 where it is the same for all batches or heads."""
    if tile.kind is not Kind.PARTIAL:
        return query, (0, 0, 0, 0)
    visible = tile.visible()
    sizes = visible.shape
    strides = (step if size > 1 else 0 for step, size in zip(visible.stride(), sizes, strict=True))
    return visible.view(torch.uint8), tuple(strides)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
