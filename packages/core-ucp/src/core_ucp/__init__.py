"""Any checkpoint resumes on any parallel layout, proven lossless.

Everything public is imported here on first use, so that the plugin costs nothing until it works.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Atom": "core_ucp.view.view",
    "Plan": "core_ucp.execution.planning",
    "Resume": "core_ucp.view.view",
    "Rules": "core_ucp.layout.rules",
    "UniversalReader": "core_ucp.reader",
    "View": "core_ucp.view.view",
    "convert": "core_ucp.api",
    "diff": "core_ucp.execution.checking",
    "execute": "core_ucp.execution.copying",
    "load_rules": "core_ucp.api",
    "open_checkpoint": "core_ucp.sources.registry",
    "plan": "core_ucp.execution.planning",
    "verify": "core_ucp.execution.checking",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from core_ucp.api import convert as convert, load_rules as load_rules
    from core_ucp.execution.checking import diff as diff, verify as verify
    from core_ucp.execution.copying import execute as execute
    from core_ucp.execution.planning import Plan as Plan, plan as plan
    from core_ucp.layout.rules import Rules as Rules
    from core_ucp.reader import UniversalReader as UniversalReader
    from core_ucp.sources.registry import open_checkpoint as open_checkpoint
    from core_ucp.view.view import Atom as Atom, Resume as Resume, View as View


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
