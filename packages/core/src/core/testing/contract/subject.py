"""The plugin under test: its contributions, its distribution, and runs with nobody else in them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contributions import (
    CheckpointFormat,
    EngineType,
    ModelFamily,
    Probe,
    Recipe,
    Settings,
    Step,
    Storage,
    Transform,
)
from core.discovery import BUILTIN
from core.hooks import Hooks
from core.plugins import Plugins
from core.testing.contract.check import Skip
from core.testing.fixtures import make_run

if TYPE_CHECKING:
    import click

    from core.run import Run


class Subject:
    """A plugin that is checked.

    Args:
        name: name of an active plugin; ``core`` is core's own.
        plugins: the plugins of the process. Runs of the checks hold the plugin and core only, so
            that no other plugin can help or disturb it.

    Raises:
        PluginError: when the plugin is not active, with the reason.
    """

    def __init__(self, name: str, plugins: Plugins) -> None:
        (self.plugin,) = plugins.require([name])
        self.name = name
        self.plugins = Plugins([plugins[BUILTIN], self.plugin])
        self._scratch = tempfile.TemporaryDirectory(prefix="core-check-")

    def folder(self) -> Path:
        """Return a new empty folder, removed when the process ends."""
        return Path(tempfile.mkdtemp(dir=self._scratch.name))

    def run(self, enable: Sequence[str] = (), **sections: Mapping[str, Any] | Settings) -> Run:
        """Start a run in a folder of its own."""
        return make_run(self.folder(), plugins=self.plugins, enable=enable, **sections)

    @property
    def is_core(self) -> bool:
        """Whether this is core's own plugin."""
        return self.name == BUILTIN

    @cached_property
    def distribution(self) -> Distribution:
        """The installed distribution.

        Raises:
            Skip: for a plugin that is not installed.
        """
        name = BUILTIN if self.is_core else self.plugin.distribution
        try:
            return distribution(name or "-")
        except (PackageNotFoundError, ValueError):
            raise Skip("not installed as a distribution") from None

    @cached_property
    def module(self) -> Path:
        """The file of the module that the entry point names.

        Raises:
            Skip: for a plugin without a file.
        """
        name = self.plugin.target.partition(":")[0]
        spec = find_spec(name) if name and name != "__main__" else None
        if spec is None or not spec.origin:
            raise Skip("the plugin has no module of its own")
        return Path(spec.origin)

    @cached_property
    def settings(self) -> list[type[Settings]]:
        """Its settings class; core has several."""
        if self.is_core:
            from core.builtin import core_sections

            return list(core_sections().values())
        return [c.value for c in self.plugins.collect_from([self.name], Hooks.core_settings)]

    @cached_property
    def transforms(self) -> list[Transform[Any]]:
        """Its transforms under default settings."""
        with self.run() as run:
            found = self.plugins.collect_from([self.name], Hooks.core_transforms, run)
        return [contributed.value for contributed in found]

    @cached_property
    def _checkpoints(self) -> list[CheckpointFormat | Storage]:
        found = self.plugins.collect_from([self.name], Hooks.core_checkpoints)
        return [contributed.value for contributed in found]

    @property
    def formats(self) -> list[CheckpointFormat]:
        """Its checkpoint formats."""
        return [value for value in self._checkpoints if isinstance(value, CheckpointFormat)]

    @property
    def storages(self) -> list[Storage]:
        """Its storages."""
        return [value for value in self._checkpoints if isinstance(value, Storage)]

    @cached_property
    def engines(self) -> list[EngineType]:
        """Its engines."""
        return [c.value for c in self.plugins.collect_from([self.name], Hooks.core_engines)]

    @cached_property
    def models(self) -> list[ModelFamily]:
        """Its model families."""
        offered = self.plugins.collect_from([self.name], Hooks.core_models)
        return [c.value for c in offered if isinstance(c.value, ModelFamily)]

    @cached_property
    def recipes(self) -> list[Recipe | Step]:
        """Its recipes and steps."""
        return [c.value for c in self.plugins.collect_from([self.name], Hooks.core_recipes)]

    @cached_property
    def probes(self) -> list[Probe]:
        """Its probes."""
        return [c.value for c in self.plugins.collect_from([self.name], Hooks.core_probes)]

    @cached_property
    def commands(self) -> list[click.Command]:
        """Its commands; for core, those of the command line itself."""
        from core.testing.contract.child import commands_of

        return commands_of(self.name, self.plugins)
