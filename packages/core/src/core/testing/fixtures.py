"""Runs and plugins for tests, without entry points and without pytest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from core.discovery import plugins_from
from core.run import start

if TYPE_CHECKING:
    from core.contributions import Settings
    from core.plugins import Plugins
    from core.run import Run


def plugin_of(instance: object, name: str) -> Plugins:
    """Plugins of one process: core's own, and an object in memory under ``name``.

    Raises:
        PluginError: when the object breaks a rule of the hooks.

    Example:
        >>> from core import Hooks, hookimpl
        >>> class Demo(Hooks):
        ...     @hookimpl
        ...     def core_probes(self):
        ...         return ()
        >>> [plugin.name for plugin in plugin_of(Demo(), "demo")]
        ['core', 'demo']
    """
    return plugins_from({name: instance})


def make_run(
    folder: Path,
    *,
    plugins: Plugins | None = None,
    enable: Sequence[str] = (),
    **sections: Mapping[str, Any] | Settings,
) -> Run:
    """Start a run in a folder; close it, or use it in a ``with`` block.

    Args:
        folder: where the run keeps its files, such as pytest's ``tmp_path``.
        plugins: what takes part; only core's own unless given.
        enable: plugins or transforms that may change a model.
        sections: settings by section, as for :func:`core.start`.

    Example:
        >>> import tempfile
        >>> with make_run(Path(tempfile.mkdtemp()), checkpoint={"keep": 1}) as run:
        ...     run.plan.ids
        []
    """
    taking_part = plugins_from({}) if plugins is None else plugins
    by_name = cast(dict[str, Any], sections)
    return start(folder=folder, plugins=taking_part, enable=list(enable), **by_name)
