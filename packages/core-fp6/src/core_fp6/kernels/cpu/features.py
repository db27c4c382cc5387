"""What this processor can do, and which variants of the kernels it can run."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

_SHARED = "threads.c", "dequantize.c"
_VECTOR = "vector.c", *_SHARED


@dataclass(frozen=True)
class Variant:
    """What the products are computed with.

    Args:
        name: ``avx512``, ``avx2``, ``plain`` or ``eager``.
        reason: why it is this one and none before it.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Build:
    """A variant of the kernels that is compiled.

    Args:
        name: of the variant.
        features: of the processor that it needs, as Linux names them.
        sources: C files.
        bfloat16: whether it multiplies bfloat16 as it is; other input comes as float32.
    """

    name: str
    features: tuple[str, ...]
    sources: tuple[str, ...]
    bfloat16: bool = False

    @property
    def flags(self) -> list[str]:
        """What tells the compiler of the features."""
        return [f"-m{feature.replace('_', '')}" for feature in self.features]


BUILDS = (
    Build(
        "avx512",
        (
            *("avx2", "fma", "gfni", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
            *("avx512vbmi", "avx512_bf16"),
        ),
        ("avx512.c", "avx512_few.c", "avx512_many.c", *_SHARED),
        bfloat16=True,
    ),
    Build("avx2", ("avx2", "fma"), _VECTOR),
    Build("plain", (), _VECTOR),
)
"""Best first."""


@functools.cache
def processor() -> frozenset[str]:
    """Features of this processor that matter here, as far as the system tells; its architecture."""
    wanted = frozenset(feature for build in BUILDS for feature in build.features)
    return (_told() & wanted) | {platform.machine()}


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
