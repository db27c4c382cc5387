"""Settings of the section ``[fp6]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.contributions import Settings


@dataclass(frozen=True, kw_only=True)
class FP6Settings(Settings):
    """How a run's model is quantized, when the run enables ``fp6``."""

    format: Literal["e2m3", "e3m2"] = "e2m3"
    """Of the codes: ``e2m3`` has more precision and wants groups, ``e3m2`` has more range."""

    group_size: Literal[0, 32, 64, 128, 256] = 128
    """Columns that share a scale; 0 for one scale per row."""

    skip: tuple[str, ...] = ()
    """Modules that are left as they are, beside the output layer and what shares its weight: names,
    their ends such as ``down_proj``, or regular expressions."""
