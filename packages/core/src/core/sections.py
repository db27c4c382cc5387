"""Which settings class each section has, and why a section cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, cast

from core.checkpoints.settings import CheckpointSettings
from core.choice import choose
from core.contributions import CheckpointFormat, Settings, Storage
from core.engines import EngineSettings
from core.hooks import Hooks
from core.plugins import Contributed, Plugins, State


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


def require_choices(plugins: Plugins, settings: Mapping[type[Settings], Settings]) -> None:
    """Stop before anything starts when a format, storage or engine is named that nobody offers.

    Raises:
        PluginError: naming the setting, and what is offered.
    """
    checkpoint = cast(CheckpointSettings, settings[CheckpointSettings])
    engine = cast(EngineSettings, settings[EngineSettings])
    carriers = plugins.collect_safely(Hooks.core_checkpoints)
    offered: list[tuple[str, str, list[Contributed[Any]]]] = [
        ("checkpoint.format", checkpoint.format, _of(CheckpointFormat, carriers)),
        ("checkpoint.storage", checkpoint.storage, _of(Storage, carriers)),
        ("engine.name", engine.name, list(plugins.collect_safely(Hooks.core_engines))),
    ]
    for key, name, candidates in offered:
        if name != "auto":
            choose(key, name, candidates, lambda candidate: "")


def _of(kind: type[Any], found: Iterable[Contributed[Any]]) -> list[Contributed[Any]]:
    return [contributed for contributed in found if isinstance(contributed.value, kind)]
