"""Load planning that never runs code from a checkpoint."""

from __future__ import annotations

import io

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, with objects unpickled under ``weights_only`` rules."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
