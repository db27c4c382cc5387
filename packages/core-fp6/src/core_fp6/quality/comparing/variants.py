"""Ways to store a weight in few bits, by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from torch import Tensor

from core.errors import SettingsError
from core_fp6.quality.comparing import libraries
from core_fp6.quality.searching import search
from core_fp6.weights.numbers import parse
from core_fp6.weights.scaling import Scheme

DEFAULT = (
    "e2m3-g128",
    "e2m3-g128-search",
    "e2m3-g128-calibrated",
    "e2m3-row",
    "e3m2-g128",
    "e3m2-row",
    "mxfp6-e2m3",
    "mxfp6-e3m2",
    "e2m2-g128",
    "fp8-e4m3-row",
    "int8-row",
    "int4-g128-asym",
    "nf4-g64",
)
"""What is compared unless asked otherwise."""
SIX_BIT = "six-bit float"

_CODES = re.compile(r"(e\dm\d)-(row|g\d+)(-search|-calibrated)?")
_INTEGERS = re.compile(r"int([1-8])-(row|g\d+)(-asym)?")
_MX = re.compile(r"mxfp6-(e3m2|e2m3)")
_GROUP_SCALE, _ROW_SCALE = 16, 32


@dataclass(frozen=True)
class Variant:
    """A way to store a weight.

    Args:
        name: as in :func:`variant`.
        family: kind of its numbers, for the plot.
        rounded: the float32 values that are stored for float32 ``[rows, columns]``, given what
            errors count in each column, or None; every row by itself.
        bits: stored bits for each weight of a row of so many columns, scales included; other
            libraries' scales are counted as 16 bits for a group and 32 for a row.
        package: that does the rounding, where it is not this one.
        calibrated: whether it needs a calibration.
    """

    name: str
    family: str
    rounded: Callable[[Tensor, Tensor | None], Tensor]
    bits: Callable[[int], float]
    package: str = ""
    calibrated: bool = False

    def missing(self, calibrated: bool) -> str | None:
        """Why it cannot be measured here, or None where it can."""
        if self.package and find_spec(self.package) is None:
            return f"needs {self.package}: pip install {self.package}"
        if self.calibrated and not calibrated:
            return "needs text to calibrate with"
        return None


def variant(name: str) -> Variant:
    """Find a variant by its name.

    Args:
        name: ``e2m3-g128``, and so any format of up to 8 bits, with ``row`` for a scale per row,
            or a group size, and with ``-search`` (least squared error) or ``-calibrated`` (weighted
            by inputs) behind it; ``int4-g128-asym``, ``int8-row`` and other widths and groups;
            ``mxfp6-e2m3``, ``mxfp6-e3m2``, ``fp8-e4m3-row``, ``nf4-g64``.

    Raises:
        SettingsError: when there is none of this name.
    """
    if found := _CODES.fullmatch(name):
        return _codes(name, found[1], _group(found[2]), found[3] or "")
    if found := _INTEGERS.fullmatch(name):
        return _integers(name, int(found[1]), _group(found[2]), bool(found[3]))
    if found := _MX.fullmatch(name):
        element = found[1]
        return Variant(
            name,
            "six-bit MX",
            lambda weight, _: libraries.microscaling(weight, element),
            lambda _: 6 + 8 / 32,
            libraries.TORCHAO,
        )
    if name == "fp8-e4m3-row":
        return Variant(
            name,
            "FP8",
            lambda weight, _: libraries.float8(weight),
            lambda columns: 8 + _ROW_SCALE / columns,
        )
    if name == "nf4-g64":
        return Variant(
            name,
            "NF4",
            lambda weight, _: libraries.normal_float(weight),
            lambda _: 4 + 32 / 64,
            libraries.BITSANDBYTES,
        )
    raise SettingsError(
        f"no variant {name!r}",
        why="variants are named like e2m3-g128, e3m2-row-search, int4-g128-asym or nf4-g64",
        fix=f"use some of {', '.join(DEFAULT)}",
    )


def _codes(name: str, element: str, group_size: int, how: str) -> Variant:
    scheme = Scheme(parse(element), group_size)
    return Variant(
        name,
        SIX_BIT if scheme.format.bits == 6 else "other float",
        partial(_rounded_codes, scheme, how),
        scheme.bits_per_weight,
        calibrated=how == "-calibrated",
    )


def _rounded_codes(scheme: Scheme, how: str, weight: Tensor, importance: Tensor | None) -> Tensor:
    counts = importance if how == "-calibrated" else None
    scale = search(weight, scheme, counts) if how else None
    return scheme.decode(*scheme.encode(weight, scale))


def _integers(name: str, bits: int, group_size: int, asymmetric: bool) -> Variant:
    def stored(columns: int) -> float:
        scale = _GROUP_SCALE if group_size else _ROW_SCALE
        return bits + (scale + bits * asymmetric) / (group_size or columns)

    return Variant(
        name,
        "integer",
        lambda weight, _: libraries.integers(weight, bits, group_size, asymmetric),
        stored,
        libraries.TORCHAO,
    )


def _group(name: str) -> int:
    return 0 if name == "row" else int(name[1:])
