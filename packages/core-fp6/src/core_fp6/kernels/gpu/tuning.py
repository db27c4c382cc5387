"""Measuring which kernel is fastest, once, before anything is captured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn

from core.errors import EngineError
from core.triton import made_current, triton
from core_fp6.kernels.gpu import fused, library, tuned
from core_fp6.kernels.gpu.configs import Config, bucket, candidates
from core_fp6.kernels.gpu.dispatch import FUSED_TOKENS, device_of
from core_fp6.kernels.gpu.settings import wants_fp8
from core_fp6.kernels.gpu.tuned import LIBRARY, Choice, Key
from core_fp6.models.sixbit import sixbit_modules
from core_fp6.weights.packed import Packed

Measure = Callable[[Callable[[], Tensor]], float]


def prepare(
    model: nn.Module | Iterable[Packed],
    batch_sizes: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    measure: Measure | None = None,
) -> int:
    """Measure the products of a model for some numbers of tokens, and remember the fastest kernels.

    Call it before CUDA graphs are captured; without it sensible defaults are used. Choices are kept
    in the user's cache directory. Where several processes work together, all of them must call it:
    the first one measures.

    Args:
        model: a model with six-bit weights, or weights ``[rows, columns]``, on a CUDA device.
        batch_sizes: numbers of tokens, up to ``FUSED_TOKENS``; larger ones have nothing to choose.
        dtype: of the activations.
        measure: returns milliseconds of a call; by default medians of ``triton.testing.do_bench``.

    Returns:
        How many products were measured.

    Raises:
        EngineError: while a CUDA graph is captured.
    """
    weights = list(_weights(model))
    if any(weight.low.is_cuda for weight in weights) and torch.cuda.is_current_stream_capturing():
        raise EngineError(
            "kernels cannot be tuned now",
            why="a CUDA graph is being captured",
            fix="call prepare() before the capture",
        )
    together = distributed.is_available() and distributed.is_initialized()
    first = not together or distributed.get_rank() == 0
    measured = _measured(weights, batch_sizes, dtype, measure or _milliseconds) if first else {}
    if together:
        box: list[Any] = [measured]
        distributed.broadcast_object_list(box, src=0)
        measured = cast(dict[str, Choice], box[0])
    tuned.keep(measured, to_disk=first and bool(measured))
    return len(measured)


def _measured(
    weights: Iterable[Packed], batch_sizes: Sequence[int], dtype: torch.dtype, measure: Measure
) -> dict[str, Choice]:
    found: dict[str, Choice] = {}
    sizes = sorted({bucket(size) for size in batch_sizes if size <= FUSED_TOKENS})
    for weight in weights:
        device, fp8 = weight.low.device, wants_fp8(weight.low.device)
        for size in sizes:
            name, (rows, columns) = device_of(device).name, weight.shape
            key = Key.of(name, size, rows, columns, dtype, weight.scheme.name, fp8)
            if str(key) in found or tuned.chosen(key) is not None:
                continue
            x = torch.randn(size, weight.columns, device=device).to(dtype)
            found[str(key)] = fastest(x, weight, fp8, measure)
    return found


def fastest(x: Tensor, weight: Packed, fp8: bool, measure: Measure) -> Choice:
    """The fastest kernel for a product.

    The library is among the choices only where it rounds no weights and no activations.
    """
    itemsize = 1 if fp8 else x.dtype.itemsize
    choices: list[Choice] = [*candidates(x.shape[0], weight.columns, itemsize, device_of(x.device))]
    if not weight.scheme.group_size and not fp8:
        choices.append(LIBRARY)
    with made_current(x):
        times: dict[Choice, float] = {
            choice: _time(x, weight, fp8, choice, measure) for choice in choices
        }
    return min(times, key=lambda choice: times[choice])


def _time(x: Tensor, weight: Packed, fp8: bool, choice: Choice, measure: Measure) -> float:
    try:
        if isinstance(choice, Config):
            return measure(lambda: fused.linear(x, weight, None, choice, fp8))
        return measure(lambda: library.linear(x, weight, None))
    except triton.OutOfResources:
        return math.inf


def _milliseconds(call: Callable[[], Tensor]) -> float:
    # It empties the L2 cache between calls: weights come from memory in a model too.
    return cast(
        float,
        import_module("triton.testing").do_bench(call, warmup=3, rep=15, return_mode="median"),
    )


def _weights(model: nn.Module | Iterable[Packed]) -> Iterator[Packed]:
    if not isinstance(model, nn.Module):
        yield from model
        return
    for _, module in sixbit_modules(model):
        for name in module.columns:
            weight = module.packed(name)
            if weight.low.ndim == 2:
                yield weight
