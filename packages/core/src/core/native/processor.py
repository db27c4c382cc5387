"""What this processor can do, and what variants of C kernels ask of it."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Build:
    """A variant of a package's kernels that is compiled.

    Args:
        name: of the variant.
        features: of the processor that it needs, as Linux names them.
        sources: C files.

    Example:
        >>> Build("avx512", ("avx512f", "avx512_bf16"), ("product.c",)).flags
        ['-mavx512f', '-mavx512bf16']
    """

    name: str
    features: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def flags(self) -> list[str]:
        """What tells the compiler of the features."""
        return [f"-m{feature.replace('_', '')}" for feature in self.features]


@functools.cache
def processor() -> frozenset[str]:
    """Features of this processor, as far as the system tells, and its architecture."""
    return _told() | {platform.machine()}


def _told() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "flags":
            return frozenset(values.split())
    return frozenset()
