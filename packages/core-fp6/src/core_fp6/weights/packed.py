"""A weight of six-bit codes: two planes of bytes and the scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from core.errors import ModelError, SettingsError
from core_fp6.layouts import execution, natural
from core_fp6.weights.numbers import Format
from core_fp6.weights.scaling import Scheme, require_finite

Layout = Literal["natural", "execution"]
_AT_ONCE = 1 << 19
"""Weights that are worked on at a time: each takes some ten words on the way."""


@dataclass(frozen=True)
class Packed:
    """A weight ``[..., rows, columns]`` of six-bit codes; leading dimensions are experts.

    Args:
        low: lower four bits of the codes, uint8 ``[..., rows, bytes]``.
        high: upper two bits, uint8, half as many bytes.
        scale: as :meth:`Scheme.scale_shape` says, in ``scheme.scale_dtype``.
        scheme: format and group size.
        columns: columns of the weight; the planes are filled up beyond.
        layout: of the planes.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    scheme: Scheme
    columns: int
    layout: Layout = "natural"

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return torch.Size((*self.low.shape[:-1], self.columns))

    @property
    def nbytes(self) -> int:
        """Bytes of the planes and the scales."""
        return self.low.nbytes + self.high.nbytes + self.scale.nbytes

    def codes(self) -> Tensor:
        """Codes of all weights, one in a byte."""
        if self.layout == "natural":
            return natural.unpack(self.low, self.high, self.columns)
        return execution.unpack(self.low, self.high, self.columns, self.scheme.format)

    def to(self, layout: Layout) -> Packed:
        """The same weight in another layout; nothing is rounded."""
        if layout == self.layout:
            return self

        def repack(low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
            codes = replace(self, low=low, high=high).codes()
            return _pack(codes, layout, self.scheme.format)

        low, high = _by_rows(repack, self.columns, self.low, self.high)
        return replace(self, low=low, high=high, layout=layout)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight; multiplied in float32 and rounded once, or in float64."""
        return self.scheme.decode(self.codes(), self.scale, dtype)


def quantize(
    weight: Tensor,
    scheme: Scheme,
    *,
    scale: Tensor | None = None,
    layout: Layout = "natural",
    name: str = "weight",
) -> Packed:
    """Round a weight to six-bit codes.

    Args:
        weight: ``[..., rows, columns]``, float16, bfloat16 or float32.
        scheme: format and group size.
        scale: scales to use instead of those that fit the largest magnitudes.
        layout: of the planes.
        name: what errors call the weight.

    Raises:
        ModelError: when the weight has NaN or infinities.
        SettingsError: when the format has not six bits.
    """
    require_six_bits(scheme.format)
    require_finite(weight, name)

    def pack(part: Tensor, scale: Tensor | None = None) -> tuple[Tensor, ...]:
        codes, scale = scheme.encode(part, scale, name)
        return *_pack(codes, layout, scheme.format), scale

    columns = weight.shape[-1]
    given = [weight] if scale is None else [weight, scale]
    low, high, scale = _by_rows(pack, columns, *given)
    return Packed(low, high, scale, scheme, columns, layout)


def require_six_bits(fmt: Format) -> None:
    """Refuse formats that do not fit a plane of four bits and one of two.

    Raises:
        SettingsError: naming what fits.
    """
    if fmt not in execution.UPPER:
        raise SettingsError(
            f"weights are not packed as {fmt.name}",
            why="the planes hold six bits of 3+2 or 2+3",
            fix=f"use {' or '.join(f.name for f in execution.UPPER)}",
        )


def checked(
    low: Tensor, high: Tensor, scale: Tensor, scheme: Scheme, columns: int, name: str = "weight"
) -> Packed:
    """A weight of planes in natural order that came from outside.

    Raises:
        ModelError: when shapes, dtypes or scales cannot be those of such a weight.
    """
    wanted = natural.planes_shape(columns)
    rows = low.shape[:-1]
    shapes = {
        name: (low, (*rows, wanted[0]), torch.uint8),
        f"{name}_hi": (high, (*rows, wanted[1]), torch.uint8),
        f"{name}_scale": (
            scale,
            tuple(scheme.scale_shape(torch.Size((*rows, columns)))),
            scheme.scale_dtype,
        ),
    }
    for part, (tensor, shape, dtype) in shapes.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ModelError(
                f"{part} is not part of a {scheme.name} weight with {columns} columns",
                why=f"it is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}",
                fix="the file is damaged or of another configuration: quantize the model again",
            )
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ModelError(
            f"{name}_scale has values that are no scales",
            why="scales are finite and positive",
            fix="the file is damaged: quantize the model again",
        )
    return Packed(low, high, scale, scheme, columns)


def _pack(codes: Tensor, layout: Layout, fmt: Format) -> tuple[Tensor, Tensor]:
    return natural.pack(codes) if layout == "natural" else execution.pack(codes, fmt)


def _by_rows(
    make: Callable[..., tuple[Tensor, ...]], columns: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Make tensors of others some rows at a time, so that little memory is needed on the way."""
    rows = tensors[0].shape[:-1]
    at_once = max(1, _AT_ONCE // max(1, columns))
    flat = [t.reshape(rows.numel(), *t.shape[len(rows) :]) for t in tensors]
    parts = zip(
        *(make(*part) for part in zip(*(torch.split(t, at_once) for t in flat), strict=True)),
        strict=True,
    )
    made = (part[0] if len(part) == 1 else torch.cat(part) for part in parts)
    return tuple(tensor.reshape(*rows, *tensor.shape[1:]) for tensor in made)
