"""Who sees whom, answered for any range of queries and keys without a mask of the whole sequence."""

from core_fpdt.masks.lazy import LazyMask, edges, lazy_mask
from core_fpdt.masks.tiles import Kind, Tile

__all__ = ["Kind", "LazyMask", "Tile", "edges", "lazy_mask"]
