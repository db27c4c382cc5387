"""Settings of the section ``[fpdt]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from core.contributions import Settings

CHUNK_TOKENS: Mapping[str, int] = {"cuda": 16384, "cpu": 1024}
"""Tokens in a chunk where the settings leave it open, by kind of device."""

JOINED_CHUNKS = 16
"""Most chunks of keys in one call of a kernel, where they lie behind each other."""


@dataclass(frozen=True, kw_only=True)
class FPDTSettings(Settings):
    """How the layers of a model are run chunk by chunk."""

    chunk_tokens: Annotated[int, Ge(0)] = 0
    """Tokens in a chunk of the whole sequence, over all ranks that share it; 0 takes 16384, and 1024
    on CPUs."""

    order: Literal["auto", "query", "key"] = "auto"
    """What the outer loop of the backward pass goes over; ``auto`` takes what moves fewer bytes."""

    offload: Literal["auto", "none", "host", "file"] = "auto"
    """Where chunks wait: on the device, in host memory, or in a file. ``auto`` is ``host`` on GPUs
    and ``none`` on CPUs."""

    folder: str = ""
    """Folder for ``offload = "file"``, on a fast local disk; the system's temporary one if empty."""

    keep_output: Annotated[float, Ge(0), Le(1)] = 1.0
    """Most of the tokens, at the end of the sequence, whose attention output is kept instead of
    computed again in the backward pass. Where memory for chunks is short, fewer are."""

    keep_keys: bool = True
    """Whether keys and values are kept for the backward pass instead of projected again."""

    host_memory: Annotated[float, Ge(0)] = 0.0
    """GiB of host memory for the chunks of this process; 0 takes 80 % of what is available, shared
    by the ranks of a node. Less than is needed stops before the first step."""

    loss_chunk_bytes: Annotated[int, Ge(1024)] = 512 * 2**20
    """Bytes of logits and their gradient that exist at once."""

    mlp_chunks: Annotated[int, Ge(1)] = 1
    """Pieces in which the feed-forward part of a chunk is run."""

    strict: bool = True
    """Probe every kind of layer before training, and refuse the model where a chunked layer computes
    something else."""

    mesh_dim: str = "sp"
    """Dimension of the run's mesh whose ranks share each sequence."""

    kernel: Literal["auto", "reference", "cpu_flash", "aten_flash", "cudnn", "triton"] = "auto"
    """What computes blocks of attention."""

    delay: Annotated[float, Gt(0), Le(1)] | None = None
    """For tests: chunks are copied by threads that wait up to this many seconds, and buffers given
    back are filled with NaN."""
