"""Attention on processors: C kernels that read keys and values where they lie, or torch.

The best variant that works here is chosen once; ``CORE_SPLITFUSE_CPU`` in the environment names
another. The meaning is that of :mod:`core_splitfuse.attention.dense`: sums in float32, the output
rounded once. What a token gets depends on its own sequence alone, to the bit: not on what else is in
the pass, nor on the number of threads.
"""

from __future__ import annotations

from core_splitfuse.attention.cpu.choosing import KERNELS, Way, choose
from core_splitfuse.attention.cpu.native import Listed, Native, Stored

__all__ = ["KERNELS", "Listed", "Native", "Stored", "Way", "choose"]
