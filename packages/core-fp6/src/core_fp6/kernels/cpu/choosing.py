"""Which variant computes: the best one that the processor and the compiler allow, chosen once."""

from __future__ import annotations

import ctypes
from pathlib import Path

from core.native import Build, Kernels, Sources, Variant
from core_fp6.kernels.cpu.eager import Eager
from core_fp6.kernels.cpu.native import Native

_VECTOR = "vector.c", "dequantize.c"
_MULTIPLIES_BFLOAT16 = Build(
    "avx512",
    (
        *("avx2", "fma", "gfni", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
        *("avx512vbmi", "avx512_bf16"),
    ),
    ("avx512.c", "avx512_few.c", "avx512_many.c", "dequantize.c"),
)


def _native(library: ctypes.CDLL, variant: Variant) -> Native | Eager:
    return Native(library, variant, bfloat16=variant.name == _MULTIPLIES_BFLOAT16.name)


KERNELS = Kernels[Native | Eager](
    Sources("core-fp6", Path(__file__).with_name("native")),
    builds=[
        _MULTIPLIES_BFLOAT16,
        Build("avx2", ("avx2", "fma"), _VECTOR),
        Build("plain", (), _VECTOR),
    ],
    native=_native,
    without="eager",
    otherwise=Eager,
    loss="products with six-bit weights are computed by torch, many times slower than by the C"
    " kernels of core-fp6",
)
"""The products in this process."""
