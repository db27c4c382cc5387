"""First-party packages that may not be installed, read from ``catalogue.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.plugins import Plugins


@dataclass(frozen=True)
class Package:
    """A package of this project.

    Args:
        name: distribution name.
        summary: what it does, in a few words.
        recipes: recipes that it adds steps to.
        quantizers: ways of quantizing that it teaches transformers, as ``config.json`` calls them.
    """

    name: str
    summary: str
    recipes: tuple[str, ...] = ()
    quantizers: tuple[str, ...] = ()

    @property
    def plugin(self) -> str:
        """Name of its plugin."""
        return self.name.removeprefix("core-")


def packages() -> list[Package]:
    """All packages of the catalogue."""
    text = Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8")
    return [
        Package(name, **{key: _frozen(value) for key, value in row.items()})
        for name, row in tomllib.loads(text).items()
    ]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def not_installed(recipe: str, plugins: Plugins) -> list[Package]:
    """Packages that would add steps to ``recipe`` and are not among ``plugins``."""
    return [p for p in packages() if recipe in p.recipes and p.plugin not in plugins]
