"""What a run that enables ``fp6`` does to its model or its pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.errors import ModelError
from core_fp6.models.quantizing import quantize
from core_fp6.settings import FP6Settings

if TYPE_CHECKING:
    from torch import nn

    from core.run import Run
    from core_fp6.models.report import Report

_DENOISERS = "transformer", "transformer_2", "unet"
"""Parts of diffusers pipelines whose weights are read at every step."""


def quantize_model(model: nn.Module, run: Run) -> nn.Module:
    """Give a model six-bit weights in place, as the settings say.

    Raises:
        ModelError: when nothing can be quantized, or a weight has NaN or infinities.
        SettingsError: for a pattern to skip that matches nothing.
    """
    _announce(run, type(model).__name__, _quantize(model, run))
    return model


def quantize_pipeline(pipeline: Any, run: Run) -> Any:
    """Give the denoiser of a diffusers pipeline six-bit weights in place, as the settings say.

    Raises:
        ModelError: when it has none, when nothing of it can be quantized, or a weight has NaN or
            infinities.
        SettingsError: for a pattern to skip that matches nothing.
    """
    found = {name: getattr(pipeline, name, None) for name in _DENOISERS}
    parts = {name: part for name, part in found.items() if part is not None}
    if not parts:
        raise ModelError(
            f"{type(pipeline).__name__} has nothing to quantize",
            why=f"it has no {', '.join(_DENOISERS[:-1])} or {_DENOISERS[-1]}",
        )
    for name, part in parts.items():
        _announce(run, name, _quantize(part, run))
    return pipeline


def _quantize(model: nn.Module, run: Run) -> Report:
    wanted = run.settings(FP6Settings)
    return quantize(model, wanted.format, wanted.group_size, wanted.skip)


def _announce(run: Run, name: str, report: Report) -> None:
    smaller = report.bytes_before / report.bytes_after
    run.announce(
        f"fp6: {name} has {report.coverage:.1%} of its parameters in {report.scheme.name},"
        f" {report.bits_per_weight:.3f} bits each; {smaller:.2f} times smaller in all,"
        " and these weights are not trained"
    )
