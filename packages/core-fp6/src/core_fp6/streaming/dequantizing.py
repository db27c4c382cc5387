"""A folder with six-bit weights becomes a plain one again, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from core.cli.progress import Advance
from core.errors import ModelError
from core.storage import new_folder
from core_fp6.streaming.folders import copy_others, require_apart, write_config
from core_fp6.streaming.quantized import Quantized
from core_fp6.streaming.shards import SHARD_SIZE, Shards
from core_fp6.streaming.source import CONFIG, Source
from core_fp6.weights.packed import Packed

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AT_ONCE = 2**21
"""Weights that are computed at once: the values on the way take several times their room."""


def dequantize_folder(
    source: Path,
    target: Path,
    dtype: Dtype | None = None,
    *,
    shard_size: int = SHARD_SIZE,
    progress: Advance | None = None,
) -> int:
    """Write plain weights with the values that the codes stand for, without loading the model.

    Args:
        source: folder with six-bit weights; nothing in it is changed.
        target: folder to create; it appears when it is complete.
        dtype: of all floating-point weights. By default those that were not quantized stay as they
            are, and the others get the dtype that ``config.json`` names, else float32.
        shard_size: bytes of a file of the new folder; about as much is kept in memory.
        progress: is told of the bytes that have been read, and of their number.

    Returns:
        Bytes of the new weights.

    Raises:
        CheckpointError: for a damaged source, a target that exists or overlaps it, or a full disk.
        ModelError: when nothing is quantized, or planes and scales do not fit together.
        SettingsError: for a format or a layout version that is not known here.
    """
    require_apart(source, target)
    with Source(source) as opened:
        quantized = Quantized(opened)
        kind = _DTYPES[dtype or _dtype_of(opened)]
        with new_folder(target) as folder:
            shards = Shards(folder, shard_size)
            for key in opened.names():
                if key in quantized.columns:
                    shards.add(key, by_rows(quantized.packed(key), kind))
                elif key not in quantized.parts:
                    quantized.require_plain(key)
                    tensor = opened.tensor(key)
                    cast = dtype is not None and tensor.is_floating_point()
                    shards.add(key, tensor.to(kind) if cast else tensor)
                if progress is not None:
                    progress(opened.size(key), opened.nbytes)
            shards.finish()
            copy_others(opened, folder)
            write_config(folder, _config(opened.config, dtype))
    return shards.nbytes


def by_rows(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Values of a weight, a few rows at a time."""
    planes = packed.low.flatten(0, -2), packed.high.flatten(0, -2)
    scale = packed.scale.flatten(0, packed.low.dim() - 2)
    step = max(1, _AT_ONCE // max(1, packed.columns))
    pieces = zip(*(torch.split(part, step) for part in (*planes, scale)), strict=True)
    made = [replace(packed, low=a, high=b, scale=c).dequantize(dtype) for a, b, c in pieces]
    return torch.cat(made).view(packed.shape)


def _dtype_of(source: Source) -> str:
    config = source.config
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise ModelError(
            f"{source.path / CONFIG} names no dtype for the weights",
            why=f"it says {name!r}",
            fix="say which with --dtype",
        )
    return str(name)


def _config(config: Mapping[str, Any], dtype: Dtype | None) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if dtype is not None:
        plain.pop("torch_dtype", None)
        plain["dtype"] = dtype
    return plain
