"""Scales: what a weight is divided by before it is rounded to codes.

One scale per output row in float32 (FP6-LLM, section 2), or one per group of neighbouring input
columns in bfloat16. A scale is rounded to its stored dtype first and the weight is divided by that,
so that the codes of a weight do not depend on where they are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import ModelError, SettingsError
from core_fp6.weights.numbers import E2M3, Format

GROUP_SIZES = 32, 64, 128, 256
ROW = 0
"""Group size that stands for one scale per row."""


@dataclass(frozen=True)
class Scheme:
    """A format of codes and how many of them share a scale.

    Args:
        format: of the codes.
        group_size: columns that share a scale: 32, 64, 128 or 256, or ``ROW`` for a whole row.

    Raises:
        SettingsError: for another group size.
    """

    format: Format = E2M3
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.group_size != ROW and self.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise SettingsError(
                f"no group size {self.group_size}",
                why=f"a scale is shared by {allowed} columns, or by a row",
                fix=f"use one of {allowed}, or {ROW} for one scale per row",
            )

    @property
    def name(self) -> str:
        """Such as ``e2m3-g128`` or ``e3m2-row``."""
        return f"{self.format.name}-{f'g{self.group_size}' if self.group_size else 'row'}"

    @property
    def scale_dtype(self) -> torch.dtype:
        """float32 for rows, bfloat16 for groups."""
        return torch.bfloat16 if self.group_size else torch.float32

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // self.group_size) if self.group_size else 1

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits for each weight of a row, scales included."""
        return self.format.bits + 8 * self.scale_dtype.itemsize * self.groups(columns) / columns

    def scale_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the scales of a weight ``[..., rows, columns]``.

        ``[..., rows]`` where a row has one, else ``[..., rows, groups]``.
        """
        return torch.Size((*shape[:-1], self.groups(shape[-1])) if self.group_size else shape[:-1])

    def scales(self, weight: Tensor) -> Tensor:
        """Scales that bring the largest magnitude of each row or group to the largest code.

        Args:
            weight: ``[..., rows, columns]``, a floating dtype.

        Returns:
            ``scale_shape(weight.shape)`` in ``scale_dtype``; finite and positive: one where all
            weights are zero.
        """
        largest = grouped(weight.float().abs(), self).amax(-1)
        scale = (largest / self.format.max).to(self.scale_dtype)
        tiny = torch.finfo(self.scale_dtype).tiny
        scale = torch.where(largest == 0, torch.ones_like(scale), scale.clamp(min=tiny))
        return scale.reshape(self.scale_shape(weight.shape))

    def spread(self, scale: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The scale of every weight, broadcastable to ``[..., rows, columns]``."""
        if not self.group_size:
            return scale.to(dtype).unsqueeze(-1)
        return scale.to(dtype).repeat_interleave(self.group_size, -1)[..., :columns]

    def encode(
        self, weight: Tensor, scale: Tensor | None = None, name: str = "weight"
    ) -> tuple[Tensor, Tensor]:
        """Codes of a weight and the scales they were made with.

        Args:
            weight: ``[..., rows, columns]``, a floating dtype.
            scale: as :meth:`scales` makes them; those by default.
            name: what errors call the weight.

        Returns:
            uint8 codes of the weight's shape, and the scales.

        Raises:
            ModelError: when the weight has NaN or infinities, which codes cannot say.
        """
        require_finite(weight, name)
        if scale is None:
            scale = self.scales(weight)
        quotient = weight.float() / self.spread(scale, weight.shape[-1])
        return self.format.encode(quotient), scale

    def decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights of codes: multiplied in float32, or in float64 where ``dtype`` is that."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        spread = self.spread(scale, codes.shape[-1], exact)
        return (self.format.decode(codes, exact) * spread).to(dtype)


def require_finite(weight: Tensor, name: str) -> None:
    """Refuse a weight with NaN or infinities.

    Raises:
        ModelError: naming the parameter and how many there are.
    """
    count = weight.numel() - int(torch.isfinite(weight).sum())
    if count:
        raise ModelError(
            f"{name} cannot be quantized",
            why=f"{count} of its {weight.numel()} values are NaN or infinite",
            fix="repair the checkpoint, or leave the module out with skip",
        )


def grouped(values: Tensor, scheme: Scheme) -> Tensor:
    """``[..., rows, groups, columns of a group]``, filled up with zeros."""
    if not scheme.group_size:
        return values.unsqueeze(-2)
    missing = -values.shape[-1] % scheme.group_size
    filled = torch.nn.functional.pad(values, (0, missing))
    return filled.view(*filled.shape[:-1], scheme.groups(values.shape[-1]), scheme.group_size)
