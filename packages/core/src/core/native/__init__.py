"""C kernels of packages: compiled at first use, for this processor, and kept for the next time.

A package has a folder of C files and variants of them, best first (:class:`Build`).
:class:`Kernels` takes the first one that the processor and the compiler allow, or the package's own
way without C, and says why. The files may include ``threads.h``, whose pool of threads stands beside
this module and is compiled along.
"""

from __future__ import annotations

from core.native.building import NativeError, Sources, cache_folder, find_compiler, load
from core.native.choosing import Kernels, Variant
from core.native.processor import Build, processor
from core.native.reporting import reading

__all__ = [
    "Build",
    "Kernels",
    "NativeError",
    "Sources",
    "Variant",
    "cache_folder",
    "find_compiler",
    "load",
    "processor",
    "reading",
]
