"""What a user may choose about precision: rounding activations to FP8."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from core.errors import EngineError

_FP8: ContextVar[bool] = ContextVar("core_fp6_fp8_activations", default=False)
_FIRST_FP8 = 8, 9
"""Compute capability of the first devices with FP8 matrix units."""


@contextmanager
def fp8_activations(enabled: bool = True) -> Generator[None]:
    """Round activations to FP8 E4M3, with a scale for each token, in all products of the block.

    Weights stay what they are: every six-bit code is an FP8 value. Products are twice as fast where
    they are bound by arithmetic, and lose about as much as FP8 inference does. A CUDA graph keeps
    what was chosen when it was captured.

    Example:
        >>> with fp8_activations():
        ...     logits = model(ids)  # doctest: +SKIP
    """
    token = _FP8.set(enabled)
    try:
        yield
    finally:
        _FP8.reset(token)


def wants_fp8(device: torch.device) -> bool:
    """Whether activations are rounded to FP8.

    Raises:
        EngineError: when they should be and the device cannot multiply FP8.
    """
    if not _FP8.get():
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FIRST_FP8:
        raise EngineError(
            f"{torch.cuda.get_device_name(device)} has no FP8 matrix units",
            why="they came with compute capability 8.9",
            fix="leave fp8_activations() out",
        )
    return True
