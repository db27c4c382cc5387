"""All layouts in one place."""

from __future__ import annotations

from core_ucp.layout.blocks import Expert as Expert, Gather as Gather
from core_ucp.layout.fused import Fused as Fused, Segment as Segment
from core_ucp.layout.holders import (
    Alias as Alias,
    Average as Average,
    Chain as Chain,
    Owner as Owner,
    Refused as Refused,
    Replicate as Replicate,
)
from core_ucp.layout.layout import Layout as Layout
from core_ucp.layout.padding import Pad as Pad
from core_ucp.layout.placement import Placement as Placement, Placements as Placements
from core_ucp.layout.shards import Shard as Shard, StridedShard as StridedShard
