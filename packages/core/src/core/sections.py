"""Which settings class each section has, and why a section cannot be used."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any, cast

from core.contributions import Settings
from core.hooks import Hooks
from core.plugins import Plugins, State


def settings_sections(plugins: Plugins) -> dict[str, type[Settings]]:
    """Settings class by section: core's own, then one for each active plugin that has one.

    A plugin that fails to give its settings, or gives two classes of them, becomes ``broken``.
    """
    from core.builtin import core_sections

    found: dict[str, type[Settings]] = dict(core_sections())
    for contributed in plugins.collect_safely(Hooks.core_settings):
        name, kind = contributed.plugin, cast(type[Any], contributed.value)
        if name in found:
            plugins.mark_broken(name, "core_settings yielded two classes")
        elif not (issubclass(kind, Settings) and is_dataclass(kind)):
            plugins.mark_broken(name, f"core_settings: {kind.__name__} is no Settings dataclass")
        found[name] = kind
    return {s: kind for s, kind in found.items() if s in core_sections() or plugins.is_active(s)}


def why_unknown(plugins: Plugins) -> dict[str, str]:
    """For plugins without a section, the sentence that says why."""
    reasons = {p.name: plugins.explain(p.name) for p in plugins if p.state is not State.ACTIVE}
    return reasons | {p.name: f"plugin {p.name!r} has no settings" for p in plugins.active}
