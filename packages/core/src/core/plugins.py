"""The plugins of a process: their states, and typed calls of their hooks."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

from core.contributions import (
    CheckpointFormat,
    EngineType,
    ModelFamily,
    ParameterRules,
    Probe,
    Recipe,
    Step,
    Storage,
    Transform,
)
from core.errors import PluginError, closest
from core.hooks import Hooks

if TYPE_CHECKING:
    from core.events import Event
    from core.run import Run

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger("core")


YIELDED_BY: Mapping[str, tuple[type[Any], ...]] = {
    "core_settings": (type,),
    "core_transforms": (Transform,),
    "core_checkpoints": (CheckpointFormat, Storage),
    "core_engines": (EngineType,),
    "core_models": (ModelFamily, ParameterRules),
    "core_recipes": (Recipe, Step),
    "core_commands": (object,),
    "core_probes": (Probe,),
}
"""What each collected hook may yield; the command line checks ``core_commands`` itself."""


class State(StrEnum):
    """What discovery made of an entry point."""

    ACTIVE = "active"
    DISABLED = "disabled"
    BROKEN = "broken"
    CONFLICT = "conflict"
    INCOMPATIBLE = "incompatible"


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One installed plugin, and why it is in the state it is in."""

    name: str
    state: State
    reason: str = ""
    distribution: str = ""
    version: str = ""
    target: str = ""
    implementations: Mapping[str, Callable[..., Any]] = field(
        default_factory=dict, repr=False, compare=False
    )


@dataclass(frozen=True)
class Contributed(Generic[R]):
    """A contribution together with the name of the plugin it came from."""

    plugin: str
    value: R

    @property
    def id(self) -> str:
        """``plugin.name`` of a named contribution."""
        return f"{self.plugin}.{getattr(self.value, 'name', '')}"


class Plugins:
    """The plugins of this process: table of states, and the calls of their hooks."""

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        self._plugins = {plugin.name: plugin for plugin in plugins}
        self._event_errors: Counter[str] = Counter()
        self.event_seconds: defaultdict[str, float] = defaultdict(float)

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self._plugins.values())

    def __getitem__(self, name: str) -> Plugin:
        return self._plugins[name]

    def __contains__(self, name: object) -> bool:
        return name in self._plugins

    @property
    def active(self) -> list[Plugin]:
        """The plugins whose hooks are called, core's own first."""
        return [plugin for plugin in self if plugin.state is State.ACTIVE]

    def collect(
        self, spec: Callable[Concatenate[Hooks, P], Iterable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> list[Contributed[R]]:
        """Call one hook of every active plugin and return what they contribute, in plugin order.

        Example:
            >>> from core import discover
            >>> engines = discover().collect(Hooks.core_engines)
            >>> [found.plugin for found in engines][0]
            'core'

        Raises:
            Exception: whatever an implementation raises, with a note naming plugin and hook.
            PluginError: when an implementation returns something else than contributions.
        """
        found: list[Contributed[R]] = []
        for plugin in self.active:
            found += self._call(plugin, spec, *args, **kwargs)
        return found

    def collect_safely(
        self, spec: Callable[Concatenate[Hooks, P], Iterable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> list[Contributed[R]]:
        """Like :meth:`collect`, but a plugin that fails becomes ``broken`` and the rest go on."""
        found: list[Contributed[R]] = []
        for plugin in self.active:
            try:
                found += self._call(plugin, spec, *args, **kwargs)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                self.mark_broken(plugin.name, f"{spec.__name__}: {one_line(error)}")
        return found

    def collect_from(
        self,
        names: Iterable[str],
        spec: Callable[Concatenate[Hooks, P], Iterable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[Contributed[R]]:
        """Like :meth:`collect`, for the named plugins only."""
        found: list[Contributed[R]] = []
        for plugin in self.require(names):
            found += self._call(plugin, spec, *args, **kwargs)
        return found

    def _call(
        self,
        plugin: Plugin,
        spec: Callable[Concatenate[Hooks, P], Iterable[R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[Contributed[R]]:
        implementation = plugin.implementations.get(spec.__name__)
        if implementation is None:
            return []
        with blame(plugin.name, f"hook {spec.__name__}"):
            values = _checked(spec.__name__, implementation(*args, **kwargs))
        return [Contributed(plugin.name, value) for value in values]

    def setup(self, enabled: Iterable[str]) -> None:
        """Call ``core_setup`` of every active plugin; one that fails becomes ``broken``.

        Raises:
            Exception: the failure of a plugin that the run enables.
        """
        needed = {name.partition(".")[0] for name in enabled}
        for plugin in self.active:
            try:
                with blame(plugin.name, "hook core_setup"):
                    plugin.implementations.get("core_setup", _nothing)()
            except Exception as error:
                if plugin.name in needed:
                    raise
                self.mark_broken(plugin.name, f"core_setup: {one_line(error)}")
                logger.warning("%s", self.explain(plugin.name))

    def notify(self, run: Run, event: Event) -> None:
        """Tell every plugin about an event. Never raises; each observer's failure is logged once."""
        for plugin in self.active:
            observer = plugin.implementations.get("core_event")
            if observer is None:
                continue
            started = time.perf_counter()
            try:
                observer(run, event)
            except Exception:
                self._event_errors[plugin.name] += 1
                if self._event_errors[plugin.name] == 1:
                    logger.exception("plugin %r failed to observe %s", plugin.name, event)
            self.event_seconds[plugin.name] += time.perf_counter() - started

    @property
    def event_errors(self) -> Mapping[str, int]:
        """How many events each observer failed on."""
        return dict(self._event_errors)

    def forget_observations(self) -> None:
        """Start counting anew: the plugins of a process may see several runs."""
        self._event_errors.clear()
        self.event_seconds.clear()

    def observations(self) -> list[str]:
        """A line on each observer that failed, or that took more than a second in all."""
        return [
            f"observer {name!r}: {seconds:.1f} s in all, {self._event_errors[name]} failures"
            for name, seconds in sorted(self.event_seconds.items())
            if seconds > 1 or self._event_errors[name]
        ]

    def require(self, names: Iterable[str]) -> list[Plugin]:
        """Return the named plugins, or stop with every one that is not active and why.

        Raises:
            PluginError: naming each plugin that is missing or not active, with its reason.
        """
        wanted = list(names)
        bad = [self.explain(name) for name in wanted if not self.is_active(name)]
        if bad:
            raise PluginError("; ".join(bad), fix="see `core plugins` for what is installed")
        return [self._plugins[name] for name in wanted]

    def is_active(self, name: str) -> bool:
        """Whether a plugin of this name takes part."""
        return name in self._plugins and self._plugins[name].state is State.ACTIVE

    def explain(self, name: str) -> str:
        """Say in one sentence why ``name`` cannot be used."""
        if name in self._plugins:
            plugin = self._plugins[name]
            return f"plugin {name!r} is {plugin.state}: {plugin.reason}"
        return f"no plugin {name!r} is installed" + closest(name, list(self._plugins))

    def mark_broken(self, name: str, reason: str) -> None:
        """Take a plugin out of every later call."""
        self._plugins[name] = replace(self._plugins[name], state=State.BROKEN, reason=reason)


@contextmanager
def blame(plugin: str, what: str) -> Generator[None]:
    """Note on whatever fails inside which plugin it came from.

    Example:
        >>> with blame("hello", "engine 'fast'"):
        ...     pass
    """
    try:
        yield
    except Exception as error:
        error.add_note(f"in plugin {plugin!r}, {what}")
        raise


def _nothing() -> None:
    pass


def _checked(hook: str, result: Any) -> list[Any]:
    expected = YIELDED_BY[hook]
    if not isinstance(result, Iterable) or isinstance(result, str | Mapping):
        raise PluginError(
            f"{hook} returned {type(result).__name__}", fix="yield contributions, or return a list"
        )
    values = list(result)
    for value in values:
        if not isinstance(value, expected):
            names = " or ".join(kind.__name__ for kind in expected)
            raise PluginError(f"{hook} yielded a {type(value).__name__}, not a {names}")
    return values


def one_line(error: BaseException) -> str:
    """Shorten an exception to one line for a table."""
    text = str(error).strip().splitlines()
    if isinstance(error, PluginError):
        return text[0]
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
