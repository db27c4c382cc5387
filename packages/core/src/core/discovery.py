"""Discovery: from installed entry points to plugins with a state each, never a crash."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from io import StringIO
from typing import Any

import pluggy

from core import hooks
from core.errors import PluginError, closest
from core.hooks import Hooks
from core.plugins import Plugin, Plugins, State, one_line

BUILTIN = "core"
"""Name of core's own plugin: what core contributes goes through the same hooks."""
RESERVED = frozenset(
    {BUILTIN, "checkpoint", "engine", "train", "quickstart"}
    | {"enable", "disable", "file", "set", "folder", "resume", "quiet", "plugins", "ranks"}
)
"""Names a plugin cannot have: core's settings sections, and the arguments of ``core.start``."""
SLOW = 1.0
"""Seconds of import from which on a plugin's row says so."""


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
    listed = (name.strip() for name in _environment("CORE_DISABLE").split(","))
    names = frozenset(disabled) | frozenset(filter(None, listed))
    off = everything_off or _environment("CORE_NO_PLUGINS") not in ("", "0")
    strictly = strict if strict is not None else _environment("CORE_STRICT") not in ("", "0")
    return _discover(names, off, strictly)


def plugins_from(instances: Mapping[str, object]) -> Plugins:
    """Make plugins of objects that no entry point names, beside core's own: for tests.

    Args:
        instances: plugin objects by name.

    Raises:
        PluginError: when an object breaks a rule of the hooks.

    Example:
        >>> [plugin.name for plugin in plugins_from({})]
        ['core']
    """
    manager, own = _with_builtin()
    plugins = [own]
    for name, instance in instances.items():
        kind = type(instance)
        target = f"{kind.__module__}:{kind.__qualname__}"
        implementations = _register(manager, name, instance)
        plugins.append(
            Plugin(name=name, state=State.ACTIVE, target=target, implementations=implementations)
        )
    return Plugins(plugins)


@cache
def _discover(disabled: frozenset[str], off: bool, strict: bool) -> Plugins:
    manager, own = _with_builtin()
    plugins = [own]
    found = _scan()
    by_name = Counter(point.name for point, _ in found if point.group == hooks.GROUP)
    for point, plugin in found:
        if any(plugin.name == known.name for known in plugins):
            continue
        if off or point.name in disabled:
            reason = "all plugins are switched off" if off else "switched off by name"
            plugins.append(replace(plugin, state=State.DISABLED, reason=reason))
        elif point.group != hooks.GROUP:
            plugins.append(_incompatible(plugin, point))
        elif by_name[point.name] > 1:
            plugins.append(_conflict(plugin, point.name, found))
        else:
            plugins.append(_load(manager, plugin, point, strict))
    return Plugins(plugins)


class _Manager(pluggy.PluginManager):
    """Looks at no special methods: they are most of a plugin's names, and cost most of its start."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        return None if name.startswith("__") else super().parse_hookimpl_opts(plugin, name)


def _with_builtin() -> tuple[pluggy.PluginManager, Plugin]:
    from core.builtin import Builtin

    manager = _Manager(hooks.PROJECT)
    manager.add_hookspecs(Hooks)
    own = Plugin(
        name=BUILTIN, state=State.ACTIVE, reason="part of core", target="core.builtin:Builtin"
    )
    return manager, replace(own, implementations=_register(manager, BUILTIN, Builtin()))


def _scan() -> list[tuple[EntryPoint, Plugin]]:
    """Entry points of our groups, in an order that all ranks of a job agree on."""
    points = entry_points()
    older_and_newer = [f"core.v{hooks.API - 1}", f"core.v{hooks.API + 1}"]
    groups = [hooks.GROUP, *older_and_newer]
    found = [(p, _describe(p)) for group in groups for p in points.select(group=group)]
    unique = {
        (p.group != hooks.GROUP, p.name, d.distribution, p.group, p.value): (p, d) for p, d in found
    }
    return [unique[key] for key in sorted(unique)]


def _describe(point: EntryPoint) -> Plugin:
    # Read once: every access parses the file. It is absent after an interrupted uninstallation.
    metadata: Any = point.dist.metadata if point.dist is not None else {}
    distribution: str = metadata.get("Name", "")
    return Plugin(
        # Core's own name is taken before anything is loaded: show the other one all the same.
        name=f"{BUILTIN} ({distribution})" if point.name == BUILTIN else point.name,
        state=State.ACTIVE,
        distribution=distribution,
        version=metadata.get("Version", ""),
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


def _conflict(plugin: Plugin, name: str, found: Iterable[tuple[EntryPoint, Plugin]]) -> Plugin:
    same = [d for point, d in found if point.name == name and point.group == hooks.GROUP]
    owners = " and ".join(other.distribution for other in same)
    reason = f"both {owners} call themselves {name!r}; uninstall one of them"
    return replace(plugin, state=State.CONFLICT, reason=reason)


def _load(manager: pluggy.PluginManager, plugin: Plugin, point: EntryPoint, strict: bool) -> Plugin:
    try:
        if point.name in RESERVED:
            raise PluginError(f"the name {point.name!r} belongs to core", fix="rename the plugin")
        started = time.perf_counter()
        with redirect_stdout(StringIO()) as printed:
            target = point.load()
            instance = target() if isinstance(target, type) else target
        remark = _remark(printed.getvalue(), time.perf_counter() - started)
        implementations = _register(manager, plugin.name, instance)
        return replace(plugin, reason=remark, implementations=implementations)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if strict:
            raise
        return replace(plugin, state=State.BROKEN, reason=one_line(error))


def _remark(printed: str, seconds: float) -> str:
    """What a user should know of a plugin that works, but does at import what it should not."""
    remarks = [f"takes {seconds:.1f} s to import"] if seconds > SLOW else []
    if printed.strip():
        remarks.append(f"prints at import: {printed.strip().splitlines()[0]!r}")
    return "; ".join(remarks)


def _register(
    manager: pluggy.PluginManager, name: str, instance: object
) -> Mapping[str, Callable[..., Any]]:
    """Register with pluggy, check every implementation, and return them by hook name."""
    _refuse_unknown_hooks(instance)
    try:
        manager.register(instance, name=name)
    except pluggy.PluginValidationError as error:
        raise PluginError(_why_invalid(str(error))) from None
    implementations: dict[str, Callable[..., Any]] = {}
    for caller in manager.get_hookcallers(instance) or ():
        for impl in caller.get_hookimpls():
            if impl.plugin is not instance:
                continue
            if caller.has_spec():
                implementations[caller.name] = _by_name(impl, caller)
            elif not impl.optionalhook:
                manager.unregister(instance)
                known = [n for n in vars(Hooks) if n.startswith("core_")]
                raise PluginError(f"unknown hook {caller.name!r}" + closest(caller.name, known))
    if not implementations:
        manager.unregister(instance)
        raise PluginError("implements no hook", fix="derive from core.Hooks and use @hookimpl")
    return implementations


def _why_invalid(text: str) -> str:
    """Say in one line what pluggy says in four: the first names the hook, the last the fault."""
    first, *_, last = text.splitlines()
    hook = first.rpartition("hook ")[2].strip("'")
    wrong = re.search(r"\{.*?'(\w+)'", last)
    if wrong is None:
        return f"{hook}: {last.strip()}"
    known = [name for name in signature(getattr(Hooks, hook)).parameters if name != "self"]
    return f"{hook} has no argument {wrong[1]!r}" + closest(wrong[1], known)


def _refuse_unknown_hooks(instance: object) -> None:
    """Find methods that look like hooks but are none, or that lack the ``@hookimpl`` mark."""
    known = [n for n in vars(Hooks) if n.startswith("core_")]
    for name in dir(type(instance) if isinstance(instance, Hooks) else instance):
        if not name.startswith("core_"):
            continue
        overridden = getattr(type(instance), name, None) is not getattr(Hooks, name, None)
        marks = getattr(getattr(instance, name), "core_impl", None)
        if name not in known and isinstance(instance, Hooks):
            if marks and marks["optionalhook"]:  # a hook of a newer core
                continue
            raise PluginError(f"unknown hook {name!r}" + closest(name, known))
        if name in known and overridden and not marks:
            raise PluginError(f"{name} is not marked", fix=f"write @hookimpl above def {name}")


def _by_name(impl: pluggy.HookImpl, caller: pluggy.HookCaller) -> Callable[..., Any]:
    """Let an implementation declare fewer arguments than the specification, as pluggy does."""
    if impl.hookwrapper or impl.wrapper:
        raise PluginError(f"{caller.name} is a wrapper", fix="order transforms by before and after")
    spec = caller.spec
    names = spec.argnames if spec is not None else impl.argnames

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        optional = {name: given[name] for name in impl.kwargnames if name in given}
        return impl.function(*[given[name] for name in impl.argnames], **optional)

    return call


def _environment(name: str) -> str:
    return os.environ.get(name, "")
