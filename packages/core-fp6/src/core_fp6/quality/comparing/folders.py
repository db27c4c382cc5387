"""A comparison on a model in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ModelError
from core.recipes.models import load_model
from core_fp6.quality.calibration import calibrate
from core_fp6.quality.comparing.evaluation import compare
from core_fp6.quality.comparing.results import Comparison
from core_fp6.quality.comparing.variants import DEFAULT, variant
from core_fp6.quality.texts import sequences


def compare_folder(
    path: Path, texts: Sequence[str], variants: Sequence[str] | None = None, count: int = 32
) -> Comparison:
    """Load a causal language model in float32 and compare ways to store its weights.

    Args:
        path: folder of the model and its tokenizer.
        texts: files or folders of text, or ``stdlib``; half of the documents calibrates.
        variants: names, see :func:`core_fp6.quality.comparing.variant`; a selection by default.
        count: sequences to compare on, at most, and to calibrate with.

    Raises:
        DataError: for text or a tokenizer that is missing, and for too little text.
        ModelError: for a model that cannot be loaded, or that is quantized already.
        SettingsError: for an unknown variant.
    """
    wanted = [variant(name) for name in variants or DEFAULT]
    model: Any = load_model(path)
    if getattr(model, "is_quantized", False):
        raise ModelError(f"{path} is quantized already", fix="compare with the original weights")
    model = model.float()
    calibrating, held_out = sequences(model, path, texts, count, 2)
    needed = any(each.calibrated for each in wanted)
    calibration = calibrate(model, calibrating) if needed else None
    return compare(
        model, held_out, variants=[each.name for each in wanted], calibration=calibration
    )
