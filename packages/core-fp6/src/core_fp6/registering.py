"""Make six-bit weights known to transformers and diffusers, without importing them for it.

A run is started for many things that load no model, and these libraries take seconds to import. So
the entries are made at once where a registry is loaded already, and else right after it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def register() -> None:
    """See to it that both libraries know ``quant_method: core_fp6``; again is fine."""
    for name, enter in _ENTRIES.items():
        if name in sys.modules:
            enter(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter_transformers(registry: Any) -> None:
    from core_fp6.integrations.config import METHOD, FP6Config

    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, FP6Config)
    registry.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _for_transformers)


def _for_transformers(config: Any, **kwargs: Any) -> Any:
    # Its module needs the library, which is in the middle of being imported when entries are made.
    from core_fp6.integrations.transformers import FP6HfQuantizer

    return FP6HfQuantizer(config, **kwargs)


def _enter_diffusers(registry: Any) -> None:
    from core_fp6.integrations.config import METHOD, FP6Config

    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, FP6Config)
    registry.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _for_diffusers)


def _for_diffusers(config: Any, **kwargs: Any) -> Any:
    from core_fp6.integrations.diffusers import FP6Quantizer

    return FP6Quantizer(config, **kwargs)


_ENTRIES: Mapping[str, Callable[[Any], None]] = {
    "transformers.quantizers.auto": _enter_transformers,
    "diffusers.quantizers.auto": _enter_diffusers,
}
"""Modules that hold the registries, and what makes the entries in each."""


class _Finder(MetaPathFinder):
    """Finds the modules of the registries where they would be found anyway."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ENTRIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _ENTRIES[fullname])
        return spec


class _Loader(Loader):
    """Loads a module and then makes the entries in it."""

    def __init__(self, inner: Loader, enter: Callable[[Any], None]) -> None:
        self._inner = inner
        self._enter = enter

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._enter(module)
