"""Weights in the microscaling formats MXFP6 (OCP Microscaling 1.0): groups of 32, scales 2^k.

Their scales are stored as E8M0, which bfloat16 holds exactly, so that MXFP6 weights run through the
same kernels as all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.errors import ModelError
from core_fp6.layouts import natural
from core_fp6.weights.numbers import Format
from core_fp6.weights.packed import Packed, require_six_bits
from core_fp6.weights.scaling import Scheme

GROUP = 32
_BIAS = 127
_NAN = 255


def scales(weight: Tensor, fmt: Format) -> Tensor:
    """The specification's own scales: the power of two of the largest magnitude, rounded down.

    Magnitudes that exceed the format after that become its largest value (section 6.3).

    Args:
        weight: ``[..., rows, columns]``, a floating dtype, columns a multiple of 32.
        fmt: of the codes.

    Returns:
        bfloat16 ``[..., rows, columns / 32]``; one where all weights are zero.
    """
    _require_groups(weight.shape[-1])
    groups = weight.float().abs().reshape(*weight.shape[:-1], -1, GROUP)
    largest = groups.amax(-1)
    power = torch.frexp(largest).exponent - 1 - (2**fmt.exponent - 1 - fmt.bias)
    scale = torch.ldexp(torch.ones_like(largest), power.clamp(-126, _BIAS))
    return torch.where(largest == 0, torch.ones_like(scale), scale).bfloat16()


def load(codes: Tensor, exponents: Tensor, fmt: Format) -> Packed:
    """A weight of MXFP6 codes, unchanged.

    Args:
        codes: uint8 below 64, one in a byte: ``[..., rows, columns]``; three bytes with four codes
            are unpacked by :mod:`core_fp6.layouts.dense`.
        exponents: E8M0, uint8 or ``torch.float8_e8m0fnu``, ``[..., rows, columns / 32]``.
        fmt: E3M2 or E2M3.

    Raises:
        ModelError: when shapes do not match, codes have more than six bits or a scale is NaN.
    """
    require_six_bits(fmt)
    columns = codes.shape[-1]
    _require_groups(columns)
    wanted = (*codes.shape[:-1], columns // GROUP)
    biased = exponents.view(torch.uint8)
    if tuple(biased.shape) != wanted:
        raise ModelError(
            "these scales are not those of these codes",
            why=f"their shape is {list(biased.shape)}, not {list(wanted)}",
        )
    if bool((codes > 63).any()):
        raise ModelError(
            "these are no codes of six bits",
            why="some are above 63",
            fix="unpack bytes with core_fp6.layouts.dense first",
        )
    if bool((biased == _NAN).any()):
        raise ModelError("a scale is NaN", why="its E8M0 code is 255")
    scale = torch.ldexp(torch.ones(wanted, device=codes.device), biased.int() - _BIAS)
    # Blocks of zeros come with the smallest scale, which is subnormal.
    empty = (codes.reshape(*wanted, GROUP) & 31 == 0).all(-1)
    scale = torch.where(empty, torch.ones_like(scale), scale)
    low, high = natural.pack(codes)
    return Packed(low, high, scale.bfloat16(), Scheme(fmt, GROUP), columns)


def _require_groups(columns: int) -> None:
    if columns % GROUP:
        raise ModelError(
            f"{columns} columns are no MXFP6 weight", why=f"{GROUP} columns share a scale"
        )
