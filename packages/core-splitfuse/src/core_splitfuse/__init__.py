"""Serving with Dynamic SplitFuse: even tails for any transformers decoder, unchanged and exact.

Everything public is imported here on first use, so that the plugin costs nothing until it works.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Engine": "core_splitfuse.engine.engine",
    "SplitFuseSettings": "core_splitfuse.settings",
    "beam_search": "core_splitfuse.beams",
    "pipeline": "core_splitfuse.completing",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from core_splitfuse.beams import beam_search as beam_search
    from core_splitfuse.completing import pipeline as pipeline
    from core_splitfuse.engine.engine import Engine as Engine
    from core_splitfuse.settings import SplitFuseSettings as SplitFuseSettings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
