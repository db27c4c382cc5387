"""Discovery: from installed entry points to plugins with a state each, never a crash."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from core import hooks
from core.errors import PluginError, closest
from core.hooks import Hooks
from core.plugins import Plugin, Plugins, State, one_line

BUILTIN = "core"
"""Name of core's own plugin: what core contributes goes through the same hooks."""
RESERVED = frozenset({BUILTIN, "checkpoint", "engine", "train", "quickstart"})
"""Names a plugin cannot have, because core's settings sections have them."""


def discover(
    *, disabled: Iterable[str] = (), everything_off: bool = False, strict: bool | None = None
) -> Plugins:
    """Find the installed plugins.

    Args:
        disabled: names that are not even imported, beside those in ``CORE_DISABLE`` (comma
            separated).
        everything_off: leave all plugins out but core's own; also ``CORE_NO_PLUGINS=1``.
        strict: raise the first failure instead of recording it; also ``CORE_STRICT=1``.
    """
    names = frozenset(disabled) | frozenset(filter(None, _environment("CORE_DISABLE").split(",")))
    off = everything_off or _environment("CORE_NO_PLUGINS") not in ("", "0")
    strictly = strict if strict is not None else _environment("CORE_STRICT") not in ("", "0")
    return _discover(names, off, strictly)


@cache
def _discover(disabled: frozenset[str], off: bool, strict: bool) -> Plugins:
    from core.builtin import Builtin

    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(Hooks)
    own = Plugin(name=BUILTIN, state=State.ACTIVE, reason="part of core", target="core.builtin")
    plugins = [replace(own, implementations=_register(manager, BUILTIN, Builtin()))]
    found = _scan()
    by_name = Counter(point.name for point in found if point.group == hooks.GROUP)
    for point in found:
        plugin = _describe(point)
        if any(plugin.name == known.name for known in plugins):
            continue
        if off or point.name in disabled:
            reason = "all plugins are switched off" if off else "switched off by name"
            plugins.append(replace(plugin, state=State.DISABLED, reason=reason))
        elif point.group != hooks.GROUP:
            plugins.append(_incompatible(plugin, point))
        elif by_name[point.name] > 1:
            plugins.append(_conflict(plugin, found))
        else:
            plugins.append(_load(manager, plugin, point, strict))
    return Plugins(plugins)


def _scan() -> list[EntryPoint]:
    """Entry points of our groups, in an order that all ranks of a job agree on."""
    points = entry_points()
    older_and_newer = [f"core.v{hooks.API - 1}", f"core.v{hooks.API + 1}"]
    found = [p for group in [hooks.GROUP, *older_and_newer] for p in points.select(group=group)]
    unique = {(p.name, p.value, p.group, _distribution_name(p)): p for p in found}
    return sorted(unique.values(), key=lambda p: (p.group != hooks.GROUP, p.name, _distribution_name(p)))


def _distribution_name(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else ""


def _describe(point: EntryPoint) -> Plugin:
    version = point.dist.version if point.dist is not None else ""
    return Plugin(
        name=point.name,
        state=State.ACTIVE,
        distribution=_distribution_name(point),
        version=version,
        target=point.value,
    )


def _incompatible(plugin: Plugin, point: EntryPoint) -> Plugin:
    made_for = point.group.removeprefix("core.v")
    newer = int(made_for) > hooks.API
    advice = f"upgrade {'core' if newer else plugin.distribution} or " + (
        f"downgrade {plugin.distribution}" if newer else "downgrade core"
    )
    reason = f"made for hook API {made_for}, this core has {hooks.API}; {advice}"
    return replace(plugin, state=State.INCOMPATIBLE, reason=reason)


def _conflict(plugin: Plugin, found: Iterable[EntryPoint]) -> Plugin:
    same = [p for p in found if p.name == plugin.name and p.group == hooks.GROUP]
    owners = " and ".join(_distribution_name(p) for p in same)
    reason = f"both {owners} call themselves {plugin.name!r}; uninstall one of them"
    return replace(plugin, state=State.CONFLICT, reason=reason)


def _load(manager: pluggy.PluginManager, plugin: Plugin, point: EntryPoint, strict: bool) -> Plugin:
    try:
        if plugin.name in RESERVED:
            raise PluginError(f"the name {plugin.name!r} belongs to core", fix="rename the plugin")
        target = point.load()
        instance = target() if isinstance(target, type) else target
        return replace(plugin, implementations=_register(manager, plugin.name, instance))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if strict:
            raise
        return replace(plugin, state=State.BROKEN, reason=one_line(error))


def _register(
    manager: pluggy.PluginManager, name: str, instance: object
) -> Mapping[str, Callable[..., Any]]:
    """Register with pluggy, check every implementation, and return them by hook name."""
    _refuse_unknown_hooks(instance)
    try:
        manager.register(instance, name=name)
    except pluggy.PluginValidationError as error:
        raise PluginError(str(error).splitlines()[-1].strip()) from None
    implementations: dict[str, Callable[..., Any]] = {}
    for caller in manager.get_hookcallers(instance) or ():
        if not caller.has_spec():
            manager.unregister(instance)
            known = [n for n in vars(Hooks) if n.startswith("core_")]
            raise PluginError(f"unknown hook {caller.name!r}" + closest(caller.name, known))
        for impl in caller.get_hookimpls():
            if impl.plugin is instance:
                implementations[caller.name] = _by_name(impl, caller)
    if not implementations:
        manager.unregister(instance)
        raise PluginError("implements no hook", fix="derive from core.Hooks and use @hookimpl")
    return implementations


def _refuse_unknown_hooks(instance: object) -> None:
    """Find methods that look like hooks but are none, or that lack the ``@hookimpl`` mark."""
    known = [n for n in vars(Hooks) if n.startswith("core_")]
    for name in dir(type(instance) if isinstance(instance, Hooks) else instance):
        if not name.startswith("core_"):
            continue
        if name not in known and isinstance(instance, Hooks):
            raise PluginError(f"unknown hook {name!r}" + closest(name, known))
        overridden = getattr(type(instance), name, None) is not getattr(Hooks, name, None)
        method = getattr(instance, name)
        if isinstance(instance, Hooks) and overridden and not hasattr(method, "core_impl"):
            raise PluginError(f"{name} is not marked", fix=f"write @hookimpl above def {name}")


def _by_name(impl: pluggy.HookImpl, caller: pluggy.HookCaller) -> Callable[..., Any]:
    """Let an implementation declare fewer arguments than the specification, as pluggy does."""
    if impl.hookwrapper or impl.wrapper:
        raise PluginError(f"{caller.name} is a wrapper", fix="order transforms by before and after")
    spec = caller.spec
    names = spec.argnames if spec is not None else impl.argnames

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return impl.function(*[given[name] for name in impl.argnames])

    return call


def _environment(name: str) -> str:
    return os.environ.get(name, "")
