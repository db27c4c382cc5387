"""What ``core doctor`` says of attention on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from core import Reading
from core.native import Variant, reading
from core_splitfuse.attention.cpu.choosing import KERNELS

if TYPE_CHECKING:
    from core import Run


def attention(run: Run) -> Iterator[Reading]:
    """What computes attention on the processor, and why."""
    yield reading(
        "CPU attention",
        _variant,
        slow=("plain", "torch"),
        advice="install a C compiler, or use a processor with AVX2",
    )


def _variant() -> Variant:
    return KERNELS.chosen().variant
