"""How many tokens the store may hold."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import nn

from core.equivalence import decoder
from core.errors import EngineError
from core_splitfuse.settings import SplitFuseSettings

_LONGEST = 2**17
"""Taken for a sequence where a model does not tell how long one may get."""


def blocks_of(
    model: nn.Module, settings: SplitFuseSettings, bytes_per_token: int, device: torch.device
) -> int:
    """Number of blocks: what was asked for, or what the share of free memory gives.

    Never more than all sequences of a pass could fill.

    Raises:
        EngineError: when not even one block fits.
    """
    size = settings.block_size
    if settings.kv_tokens:
        return -(-settings.kv_tokens // size)
    config: Any = getattr(decoder(model), "config", None)
    longest = getattr(config, "max_position_embeddings", None) or _LONGEST
    free = int(free_memory(device) * settings.kv_memory)
    tokens = min(free // bytes_per_token, settings.sequences * int(longest))
    if tokens < size:
        raise EngineError(
            "there is no memory for keys and values",
            why=f"{free} bytes are free for them, and a block takes {bytes_per_token * size}",
            fix="free some, or raise splitfuse.kv_memory",
        )
    return tokens // size


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
