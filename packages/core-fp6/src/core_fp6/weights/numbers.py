"""Small floating-point formats without infinities and NaN: what their codes are worth.

A code is sign, exponent and mantissa, most significant bit first; every code is a finite number
(the element formats of OCP Microscaling 1.0, section 5.3, and FP6-LLM, arXiv 2401.14112, section 2).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import SettingsError

_ENCODABLE = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Format:
    """A format of ``1 + exponent + mantissa`` bits.

    Args:
        exponent: bits of the exponent, 1 to 6.
        mantissa: bits of the mantissa, 0 to 6; at most 8 bits in all.

    Example:
        >>> E2M3.bits, E2M3.max, E2M3.min_subnormal
        (6, 7.5, 0.125)
        >>> E2M3.encode(torch.tensor([0.3, -100.0])).tolist()
        [2, 63]
    """

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if not (1 <= self.exponent <= 6 and 0 <= self.mantissa <= 6 and self.bits <= 8):
            raise SettingsError(
                f"no format e{self.exponent}m{self.mantissa}",
                why="1 to 6 bits of exponent, 0 to 6 of mantissa and 8 in all are possible",
                fix="use e2m3 or e3m2",
            )

    @property
    def name(self) -> str:
        """Such as ``e2m3``."""
        return f"e{self.exponent}m{self.mantissa}"

    @property
    def bits(self) -> int:
        """Bits of a code, the sign included."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is taken off the stored exponent."""
        return int(2 ** (self.exponent - 1)) - 1

    @property
    def max(self) -> float:
        """Largest value."""
        return float(2.0 ** (2**self.exponent - 1 - self.bias) * (2 - 2.0**-self.mantissa))

    @property
    def min_normal(self) -> float:
        """Smallest positive value with a leading one."""
        return float(2.0 ** (1 - self.bias))

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value."""
        return float(2.0 ** (1 - self.bias - self.mantissa))

    def encode(self, values: Tensor) -> Tensor:
        """Round to the nearest code; what is too large becomes the largest.

        Ties go to the even code, and to the larger one in a format without mantissa.

        Args:
            values: float16, bfloat16 or float32 of any shape, finite.

        Returns:
            uint8 codes of the same shape.

        Raises:
            TypeError: for another dtype.
        """
        if values.dtype not in _ENCODABLE:
            raise TypeError(f"codes are made of float16, bfloat16 or float32, not {values.dtype}")
        single = values.float()
        size = single.abs().clamp(max=self.max)
        power = ((size.view(torch.int32) >> 23) - 127).clamp(min=1 - self.bias)
        per_step = ((127 + self.mantissa - power) << 23).view(torch.float32)
        # A power of two times a float is exact, so this rounds once. A mantissa that is rounded up
        # to the next power of two carries into the exponent by itself.
        steps = (size * per_step).round().to(torch.int32)
        codes = ((power + self.bias - 1) << self.mantissa) + steps
        return (codes | (single.view(torch.int32) < 0).int() << (self.bits - 1)).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of codes, exactly.

        Args:
            codes: uint8 of any shape, below ``2 ** bits``.
            dtype: a floating type that can hold all values.

        Raises:
            TypeError: when ``dtype`` cannot hold them.
        """
        return _table(self, dtype, codes.device)[codes.int()]

    def values(self) -> list[float]:
        """Values of all codes, in the order of the codes."""
        half, ones = 2 ** (self.bits - 1), 2**self.mantissa
        positive = []
        for code in range(half):
            power, fraction = divmod(code, ones)
            leading = 1.0 if power else 0.0
            positive.append(2.0 ** (max(power, 1) - self.bias) * (leading + fraction / ones))
        return positive + [-value for value in positive]


@functools.cache
def _table(fmt: Format, dtype: torch.dtype, device: torch.device) -> Tensor:
    exact = torch.tensor(fmt.values(), dtype=torch.float64, device="cpu")
    table = exact.to(dtype)
    if not torch.equal(table.double(), exact):
        raise TypeError(f"{dtype} does not hold all values of {fmt.name}")
    return table.to(device)


E3M2 = Format(3, 2)
"""FP6 of the FP6-LLM and ZeroQuant(4+2) papers; the element type of MXFP6 E3M2."""
E2M3 = Format(2, 3)
"""One more bit of precision and less range: the better one with groups; MXFP6 E2M3."""
E2M2 = Format(2, 2)
"""FP5 of the papers."""


def parse(name: str) -> Format:
    """Find a format by its name, such as ``e2m3``.

    Raises:
        SettingsError: when it is none.
    """
    found = re.fullmatch(r"e(\d)m(\d)", name)
    if found is None:
        raise SettingsError(
            f"no format {name!r}", why="formats are named like e2m3", fix="use e2m3 or e3m2"
        )
    return Format(int(found[1]), int(found[2]))
