"""Triton, which has no types, for code that is checked."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.errors import EngineError

try:
    triton: Any = import_module("triton")
    tl: Any = import_module("triton.language")
    libdevice: Any = import_module("triton.language.extra.cuda.libdevice")
except ImportError as missing:
    why = "its kernels are written in Triton, which is not installed"
    fix = "python3 -m pip install triton"
    raise EngineError("paged attention on GPUs cannot run", why=why, fix=fix) from missing

if TYPE_CHECKING:
    tensor = Any
    constexpr = Any
else:
    # Triton looks at the annotations of kernels.
    tensor, constexpr = tl.tensor, tl.constexpr

OPTIONS = {"enable_fp_fusion": True}
"""Of all launches: a product and a sum are one instruction, whatever is the default of Triton."""

# The interpreter cuts bits off where a GPU rounds to bfloat16.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

Function = Callable[..., Any]


def jit(function: Function) -> Any:
    """A part of kernels in the language of Triton."""
    return triton.jit(function)


def kernel(*varying: str) -> Callable[[Function], Any]:
    """A kernel.

    Args:
        varying: parameters that change from call to call, such as a stride that follows the number
            of blocks. It is not compiled anew for one and for multiples of 16 of them.
    """
    return lambda function: triton.jit(function, do_not_specialize=varying)


def made_current(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which may be another one than that of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@jit
def rounded(values: tensor, dtype: constexpr) -> tensor:
    """float32 values rounded to the nearest of ``dtype``, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return values.to(dtype)


@jit
def _within_a_turn(angle: tensor) -> tensor:
    """The same angle between -pi and pi, with the digits that it has; up to 2**24 turns."""
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    # Two pi in two parts: with fused products the first difference is exact.
    return tl.fma(turns, 1.7484555e-07, tl.fma(turns, -6.2831854820251465, angle))


@jit
def sine(angle: tensor) -> tensor:
    """Sine of angles of any size, to 5e-7."""
    angle = _within_a_turn(angle)
    return tl.sin(angle) if INTERPRETED else libdevice.fast_sinf(angle)


@jit
def cosine(angle: tensor) -> tensor:
    """Cosine of angles of any size, to 5e-7."""
    angle = _within_a_turn(angle)
    return tl.cos(angle) if INTERPRETED else libdevice.fast_cosf(angle)


@jit
def product(left: tensor, right: tensor, precision: constexpr) -> tensor:
    """Product of matrices, added up in float32."""
    if INTERPRETED:
        # The interpreter cannot multiply bfloat16.
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision=precision)


@jit
def offset_of(index: tensor, stride: tensor) -> tensor:
    """``index * stride`` in 64 bits: stores and outputs may be large."""
    return index.to(tl.int64) * stride
