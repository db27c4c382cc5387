"""The hook specification: everything a plugin can be asked for.

A plugin is a class that derives from :class:`Hooks` and overrides what it needs. Because the
specification *is* the base class, type checkers hold every implementation against it, and an editor
completes the hook names. Entry points of the group ``core.v1`` name the class; the number in the
group is :data:`API`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pluggy

if TYPE_CHECKING:
    import click
    from typing_extensions import override as override

    from core.contributions import (
        CheckpointContribution,
        EngineType,
        ModelContribution,
        Probe,
        RecipeContribution,
        Settings,
        Transform,
    )
    from core.events import Event
    from core.run import Run
else:

    def override(method: Any) -> Any:
        """Mark a method that overrides a hook; only type checkers look at it."""
        return method


API = 1
"""Major number of the hook interface; additive changes keep it, a removal raises it."""

GROUP = f"core.v{API}"
"""Entry-point group in which plugins of this interface register."""

PROJECT = "core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

P = ParamSpec("P")
R = TypeVar("R")


class Hooks:
    """The hooks. Each is called once for every active plugin, in the order of plugin names.

    Example:
        >>> class Plugin(Hooks):
        ...     '''Says hello.'''
        ...
        ...     @override
        ...     @hookimpl
        ...     def core_probes(self):
        ...         from core import Probe, Reading
        ...
        ...         def measure(run):
        ...             yield Reading(name="greeting", status="ok", value="hello")
        ...
        ...         yield Probe(name="greeting", summary="Says hello.", measure=measure)
    """

    @hookspec
    def core_settings(self) -> Iterable[type[Settings]]:
        """Yield at most one settings dataclass; its section is the plugin's name.

        Called before a run validates its settings. Must not import torch.
        """
        return ()

    @hookspec
    def core_setup(self) -> None:
        """Register with a third-party registry, once, before a run touches a model or a file.

        For what must be in place before somebody else's code looks for it: Auto classes,
        quantizers and attention functions of transformers. Must be idempotent, and must change no
        behaviour of code that does not ask for it by name.
        """

    @hookspec
    def core_transforms(self, run: Run) -> Iterable[Transform[Any]]:
        """Yield the transforms that ``run`` gets when it names this plugin.

        Called only for enabled plugins, while the plan is made; nothing may be changed yet.
        """
        return ()

    @hookspec
    def core_checkpoints(self) -> Iterable[CheckpointContribution]:
        """Yield checkpoint formats, and storages that carry their bytes."""
        return ()

    @hookspec
    def core_engines(self) -> Iterable[EngineType]:
        """Yield inference engines."""
        return ()

    @hookspec
    def core_models(self) -> Iterable[ModelContribution]:
        """Yield model families with their presets, and rules of how parameters are laid out."""
        return ()

    @hookspec
    def core_recipes(self) -> Iterable[RecipeContribution]:
        """Yield recipes for ``core run``, and steps for recipes of others."""
        return ()

    @hookspec
    def core_commands(self) -> Iterable[click.Command]:
        """Yield commands for the ``core`` command line.

        Called whenever ``core --help`` is shown: import click and the standard library only, and
        everything else inside the command's function.
        """
        return ()

    @hookspec
    def core_probes(self) -> Iterable[Probe]:
        """Yield fast probes for ``core doctor`` and slow ones for ``core bench``."""
        return ()

    @hookspec
    def core_event(self, run: Run, event: Event) -> None:
        """Observe a moment of the run; an exception is logged once and never stops training."""


def implements(
    spec: Callable[Concatenate[Hooks, P], R],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a module-level function as the implementation of a hook.

    For authors who prefer a module to a class: the entry point then names the module.

    Example:
        >>> @implements(Hooks.core_probes)
        ... def probes():
        ...     return ()
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        return hookimpl(specname=spec.__name__)(function)

    return mark
