"""What kernels of attention say in the language of Triton."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from core.errors import EngineError

try:
    from core.triton import (
        OPTIONS as OPTIONS,
        constexpr as constexpr,
        jit as jit,
        kernel as kernel,
        made_current as made_current,
        tensor as tensor,
        tl as tl,
        triton as triton,
    )

    libdevice: Any = import_module("triton.language.extra.cuda.libdevice")
except ImportError as missing:
    why = "its kernels are written in Triton, which is not installed"
    fix = "python3 -m pip install triton"
    raise EngineError("paged attention on GPUs cannot run", why=why, fix=fix) from missing

# The interpreter cuts bits off where a GPU rounds to bfloat16.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


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
