"""Training on sequences many times longer, on the same hardware, for any transformers decoder.

Everything public is imported here on first use, so that the plugin costs nothing until it works.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Enabled": "core_fpdt.enabling",
    "FPDTSettings": "core_fpdt.settings",
    "enable": "core_fpdt.enabling",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from core_fpdt.enabling import Enabled as Enabled, enable as enable
    from core_fpdt.settings import FPDTSettings as FPDTSettings


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
