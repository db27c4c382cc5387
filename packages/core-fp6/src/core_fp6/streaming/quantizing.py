"""A folder of a model becomes one with six-bit weights, tensor by tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from core.cli.progress import Advance
from core.errors import ModelError
from core.storage import new_folder
from core_fp6.integrations.transformers import FP6Config, not_converted
from core_fp6.models.quantizing import count_parameters
from core_fp6.models.report import Report
from core_fp6.models.selecting import select
from core_fp6.models.sixbit import parts_of
from core_fp6.streaming import skeleton
from core_fp6.streaming.folders import copy_others, require_apart, write_config
from core_fp6.streaming.shards import SHARD_SIZE, Shards
from core_fp6.streaming.source import Source
from core_fp6.weights.numbers import parse
from core_fp6.weights.packed import quantize, require_six_bits
from core_fp6.weights.scaling import Scheme, require_finite

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 2**21
"""Weights that are rounded at once: the float32 values on the way take several times their room."""


def quantize_folder(
    source: Path,
    target: Path,
    format: str = "e2m3",
    group_size: int = 128,
    skip: Sequence[str] = (),
    *,
    shard_size: int = SHARD_SIZE,
    progress: Advance | None = None,
) -> Report:
    """Quantize a Hugging Face folder of safetensors without loading the model.

    The new folder holds, bit for bit, the weights that ``save_pretrained`` of the quantized model
    would write. It appears when it is complete; until then, and after a failure, there is none.

    Args:
        source: folder with ``config.json`` and safetensors files; nothing in it is changed.
        target: folder to create.
        format: of the codes, ``e2m3`` or ``e3m2``.
        group_size: columns that share a scale, or 0 for one scale per row.
        skip: modules to leave out beside output layers, embeddings and routers; see
            :func:`core_fp6.models.selecting.select`.
        shard_size: bytes of a file of the new folder; about as much is kept in memory.
        progress: is told of the bytes that have been read, and of their number.

    Raises:
        CheckpointError: for a damaged source, a target that exists or overlaps it, or a full disk.
        ModelError: for a model that transformers does not know or that is quantized already, and
            for a weight with NaN or infinities.
        SettingsError: for a wrong format, group size or pattern.
    """
    scheme = Scheme(parse(format), group_size)
    require_six_bits(scheme.format)
    require_apart(source, target)
    with Source(source) as opened:
        require_plain(opened)
        model = skeleton.build(opened)
        selection = select(model, skip)
        weights = {name: weight for name, _, weight in selection.weights()}
        columns = {name: weight.shape[-1] for name, weight in weights.items()}
        taken = skeleton.by_key(skeleton.places(model, opened), columns)
        if not taken:
            raise ModelError(f"there is nothing to quantize in {source}")
        left_out = not_converted(model, selection)
        config = FP6Config(format, group_size, skip, modules_to_not_convert=left_out)
        with new_folder(target) as folder:
            shards = Shards(folder, shard_size)
            packed = 0
            for key in opened.names():
                tensor = opened.tensor(key)
                made = parts(key, tensor, scheme) if key in taken else {key: tensor}
                for name, part in made.items():
                    shards.add(name, part)
                    packed += part.nbytes if key in taken else 0
                if progress is not None:
                    progress(tensor.nbytes, opened.nbytes)
            shards.finish()
            copy_others(opened, folder)
            write_config(folder, {**opened.config, "quantization_config": config.to_dict()})
    quantized = Counter[str]()
    for name, weight in weights.items():
        quantized[name.rpartition(".")[0]] += weight.numel()
    return Report(
        scheme,
        dict(quantized),
        selection.left_out,
        count_parameters(model),
        opened.nbytes,
        shards.nbytes,
        packed,
    )


def require_plain(source: Source) -> None:
    """Refuse a folder that is quantized already.

    Raises:
        ModelError: naming the method.
    """
    found = source.config.get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ModelError(
            f"{source.path} is quantized already",
            why=f"config.json names {method}",
            fix="quantize the original weights",
        )


def parts(key: str, tensor: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """What a weight becomes on disk, by name.

    Raises:
        ModelError: when the weight has NaN or infinities, or is of no floating type.
    """
    if not tensor.is_floating_point() or tensor.dim() < 2:
        why = f"it is {tensor.dtype} {list(tensor.shape)}"
        raise ModelError(f"{key} cannot be quantized", why=why, fix="leave it out with skip")
    require_finite(tensor, key)
    # Rows have codes and scales of their own, so a few at a time come out the same.
    lead, flat = tensor.shape[:-1], tensor.flatten(0, -2)
    step = max(1, _AT_ONCE // max(1, tensor.shape[-1]))
    done = [quantize(rows, scheme, name=key) for rows in torch.split(flat, step)]
    pieces = zip(*((each.low, each.high, each.scale) for each in done), strict=True)
    whole = (torch.cat(piece) for piece in pieces)
    shaped = (part.view(*lead, *part.shape[1:]) for part in whole)
    return dict(zip(parts_of(key), shaped, strict=True))
