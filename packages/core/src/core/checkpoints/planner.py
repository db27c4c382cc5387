"""Load planning that never runs code from a checkpoint."""

from __future__ import annotations

import io

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from core.errors import CheckpointError


class SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner: names all missing keys at once, and unpickles by ``weights_only`` rules."""

    def create_local_plan(self) -> LoadPlan:
        metadata = self.metadata
        assert metadata is not None
        missing = sorted(self.state_dict.keys() - metadata.state_dict_metadata.keys())
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CheckpointError(f"it has no {', '.join(missing[:5])}{more}")
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
