"""What ranks run of which one fails inside a layer, while the others wait for its heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.testing import tiny
from core_fpdt import enable


def on_rank(folder: Path) -> None:
    model: Any = tiny.llama().train()
    enabled = enable(model, group=dist.group.WORLD, chunk_tokens=8, strict=False)
    if dist.get_rank() == 1:
        model.model.layers[1].mlp.register_forward_hook(fail)
    model(**enabled.shard(tiny.batch()), use_cache=False)


def fail(*_: Any) -> None:
    raise RuntimeError("a layer failed")
