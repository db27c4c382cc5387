"""Who computes the attention of few tokens over many: the C kernels, or torch, and why."""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from core.native import Build, Kernels, Sources, Variant
from core_splitfuse.attention.cpu.native import DTYPES, Native

logger = logging.getLogger("core")

_FILES = "attend.c", "keep.c"
_AVX2 = "avx2", "fma"
_AVX512 = *_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl"
_WIDEST = 2048
"""Elements of a head for which threads have room."""


@dataclass(frozen=True)
class Absent:
    """No C kernel.

    Args:
        variant: why.
    """

    variant: Variant


class Way(NamedTuple):
    """How a layer attends.

    Args:
        kernel: what computes; ``None`` for torch.
        reason: why it is this one.
    """

    kernel: Native | None
    reason: str


def _native(library: ctypes.CDLL, variant: Variant) -> Native | Absent:
    return Native(library, variant)


KERNELS = Kernels[Native | Absent](
    Sources("core-splitfuse", Path(__file__).with_name("native")),
    builds=[
        Build("avx512_bf16", (*_AVX512, "avx512_bf16"), _FILES),
        Build("avx512", _AVX512, _FILES),
        Build("avx2", _AVX2, _FILES),
        Build("plain", (), _FILES),
    ],
    native=_native,
    without="torch",
    otherwise=Absent,
    loss="attention is computed by torch, sequence by sequence, which takes several times longer"
    " than the C kernels of core-splitfuse",
)
"""The attention of this process."""


def choose(keys: Tensor, values: Tensor) -> Way:
    """Choose by what a layer keeps; the reason against C is logged once.

    Args:
        keys: (Hkv, S, D).
        values: (Hkv, S, Dv).
    """
    reason = _refusal(keys, values)
    if not reason:
        found = KERNELS.chosen()
        if isinstance(found, Native):
            return Way(found, f"{found.variant.name}: {found.variant.reason}")
        reason = found.variant.reason
    _note(reason)
    return Way(None, reason)


def _refusal(keys: Tensor, values: Tensor) -> str:
    """Why the C kernels cannot do it, wherever they run."""
    for tensor in (keys, values):
        if type(tensor) is not Tensor:
            return f"keys and values are of the kind {type(tensor).__name__}"
        if tensor.device.type != "cpu":
            return f"keys and values are on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{_name(tensor.dtype)} is left to torch"
        if tensor.shape[2] > _WIDEST:
            return f"heads of {tensor.shape[2]} elements are left to torch"
    if keys.dtype != values.dtype:
        return f"keys are {_name(keys.dtype)} and values {_name(values.dtype)}"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _note(reason: str) -> None:
    logger.info("attention is computed by torch: %s", reason)
