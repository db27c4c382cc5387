"""Six-bit floating-point weights that are exact, fast on GPU and CPU, and load anywhere.

Everything public is imported here on first use, so that the plugin costs nothing until it works.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "E2M2": "core_fp6.weights.numbers",
    "E2M3": "core_fp6.weights.numbers",
    "E3M2": "core_fp6.weights.numbers",
    "FP6Config": "core_fp6.integrations.transformers",
    "FP6Experts": "core_fp6.models.experts",
    "FP6Linear": "core_fp6.models.linear",
    "Format": "core_fp6.weights.numbers",
    "Packed": "core_fp6.weights.packed",
    "Report": "core_fp6.models.report",
    "Scheme": "core_fp6.weights.scaling",
    "dequantize": "core_fp6.models.quantizing",
    "describe": "core_fp6.models.quantizing",
    "prepare": "core_fp6.models.sixbit",
    "quantize": "core_fp6.models.quantizing",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from core_fp6.integrations.transformers import FP6Config as FP6Config
    from core_fp6.models.experts import FP6Experts as FP6Experts
    from core_fp6.models.linear import FP6Linear as FP6Linear
    from core_fp6.models.quantizing import (
        dequantize as dequantize,
        describe as describe,
        quantize as quantize,
    )
    from core_fp6.models.report import Report as Report
    from core_fp6.models.sixbit import prepare as prepare
    from core_fp6.weights.numbers import E2M2 as E2M2, E2M3 as E2M3, E3M2 as E3M2, Format as Format
    from core_fp6.weights.packed import Packed as Packed
    from core_fp6.weights.scaling import Scheme as Scheme


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
