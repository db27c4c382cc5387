"""Paged attention on GPUs, in Triton: groups of heads, windows, softcap, sinks, rotation, any length.

:class:`Paged` is the store of an engine. Its parts can be used without it: :class:`Plan` describes a
pass once for all layers, :func:`write` keeps keys and values, :func:`attend` reads them.
"""

from core_splitfuse.attention.gpu.atoms import Spread as Spread
from core_splitfuse.attention.gpu.dispatch import attend as attend
from core_splitfuse.attention.gpu.graphs import GraphRunner as GraphRunner
from core_splitfuse.attention.gpu.plan import Plan as Plan, Room as Room
from core_splitfuse.attention.gpu.rotation import Rotation as Rotation
from core_splitfuse.attention.gpu.store import Paged as Paged
from core_splitfuse.attention.gpu.varlen import Choice as Choice, choose as choose
from core_splitfuse.attention.gpu.write import copy_blocks as copy_blocks, write as write
