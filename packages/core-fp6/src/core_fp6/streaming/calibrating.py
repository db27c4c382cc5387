"""A folder is quantized with scales that were searched for a text: the model is loaded for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.recipes.models import load_model
from core.storage import new_folder
from core_fp6.models.quantizing import quantize
from core_fp6.quality.calibration import calibrate
from core_fp6.quality.texts import sequences
from core_fp6.streaming.folders import copy_others, require_apart, write_config
from core_fp6.streaming.quantizing import require_plain
from core_fp6.streaming.source import Source, read_json

if TYPE_CHECKING:
    from core_fp6.models.report import Report

_SEQUENCES = 64


def quantize_calibrated(
    source: Path,
    target: Path,
    texts: Sequence[str],
    format: str = "e2m3",
    group_size: int = 128,
    skip: Sequence[str] = (),
) -> Report:
    """Quantize a causal language model with scales that keep its outputs on a text.

    Args:
        source: folder of the model and its tokenizer; nothing in it is changed.
        target: folder to create; it appears when it is complete.
        texts: files or folders of text, as for training.
        format: of the codes, ``e2m3`` or ``e3m2``.
        group_size: columns that share a scale, or 0 for one scale per row.
        skip: modules to leave out beside output layers, embeddings and routers.

    Raises:
        CheckpointError: for a damaged source, a target that exists or overlaps it, or a full disk.
        DataError: for text or a tokenizer that is missing, and for too little text.
        ModelError: for a model that cannot be loaded or quantized.
        SettingsError: for a wrong format, group size or pattern.
    """
    require_apart(source, target)
    with Source(source) as opened:
        require_plain(opened)
        model: Any = load_model(source)
        (ids,) = sequences(model, source, texts, _SEQUENCES, 1)
        calibration = calibrate(model, ids, skip=skip)
        report = quantize(model, format, group_size, skip, calibration=calibration)
        with new_folder(target) as folder:
            model.save_pretrained(folder)
            told = read_json(folder / "config.json")["quantization_config"]
            copy_others(opened, folder)
            write_config(folder, {**opened.config, "quantization_config": told})
    return report
