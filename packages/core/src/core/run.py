"""The run: validated settings, the plan, checkpoints, engines and events in one place."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from core import hooks
from core.contributions import Settings, Stage
from core.discovery import BUILTIN, discover
from core.disk import replace_file
from core.distributed import Ranks
from core.errors import CoreError, PluginError
from core.events import Event, RunEnded, RunStarted
from core.hooks import Hooks
from core.plan import Plan, select
from core.plugins import Plugins
from core.sections import require_choices, settings_sections, why_unknown
from core.settings import dump, gather, names, validate

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from core.checkpoints.manager import Checkpoints, Loaded
    from core.checkpoints.save import Save
    from core.engines import Engine
    from core.engines.live import LiveEngines

S = TypeVar("S", bound=Settings)
T = TypeVar("T")


class Run:
    """One run of training, serving or conversion. Made by :func:`start`.

    Attributes:
        plugins: the plugins of this process.
        enabled: the plugins and transforms that this run names.
        plan: the ordered transforms.
        ranks: this process among its ranks.
        folder: where the run keeps its files.
        resume: whether recipes go on from the newest checkpoint of ``folder``.
        quiet: whether the plan and the choices of the run are not printed.
    """

    def __init__(
        self,
        plugins: Plugins,
        settings: Mapping[type[Settings], Settings],
        enabled: Sequence[str],
        folder: Path,
        ranks: Ranks,
        *,
        resume: bool = False,
        quiet: bool = False,
    ) -> None:
        self.plugins = plugins
        self.enabled = tuple(enabled)
        self.folder = folder
        self.ranks = ranks
        self.resume = resume
        self.quiet = quiet
        self._settings = dict(settings)
        self._checkpoints: Checkpoints | None = None
        self._engines: LiveEngines | None = None
        self._open = True
        found = plugins.collect_from(_owners(self.enabled), Hooks.core_transforms, self)
        self.plan = Plan.build(select(found, self.enabled), self.enabled)

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.ranks.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that prints and commits."""
        return self.ranks.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this rank, or the CPU."""
        return self.ranks.device

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh of the ranks, see :attr:`Ranks.mesh`; ``None`` for a single process."""
        return self.ranks.mesh

    def settings(self, kind: type[S]) -> S:
        """The validated settings of a section, found by their class.

        Raises:
            PluginError: when no active plugin has such a section.
        """
        if kind not in self._settings:
            raise PluginError(f"no active plugin has settings of type {kind.__name__}")
        return cast(S, self._settings[kind])

    def apply(self, stage: Stage[T], subject: T) -> T:
        """Chain the planned transforms of ``stage`` over ``subject``; see :meth:`Plan.apply`."""
        return self.plan.apply(stage, subject, self)

    def emit(self, event: Event) -> None:
        """Tell all plugins about an event; an observer's failure never stops the run."""
        self.plugins.notify(self, event)

    @property
    def checkpoints(self) -> Checkpoints:
        """The checkpoints of this run."""
        if self._checkpoints is None:
            from core.checkpoints.manager import Checkpoints

            self._checkpoints = Checkpoints(self)
        return self._checkpoints

    def save(self, state: Mapping[str, Any], step: int) -> Save:
        """Submit a checkpoint; see :meth:`core.checkpoints.manager.Checkpoints.save`."""
        return self.checkpoints.save(state, step)

    def load(self, state: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> Loaded:
        """Load a checkpoint in place; see :meth:`core.checkpoints.manager.Checkpoints.load`."""
        return self.checkpoints.load(state, path)

    def engine(self, model: nn.Module, name: str | None = None) -> Engine:
        """Build an inference engine on a live module; see :meth:`LiveEngines.build`.

        Args:
            model: a transformers causal language model.
            name: an engine's name, or ``None`` for ``engine.name`` of the settings.
        """
        if self._engines is None:
            from core.engines.live import LiveEngines

            self._engines = LiveEngines(self)
        return self._engines.build(model, name)

    def describe(self) -> dict[str, Any]:
        """What this run is made of, as JSON values: written beside every checkpoint."""
        active = {p.name: p.version for p in self.plugins.active if p.name != BUILTIN}
        return {
            "api": hooks.API,
            "plugins": active,
            "enabled": list(self.enabled),
            "plan": self.plan.describe(),
        }

    def settings_tree(self) -> dict[str, Any]:
        """All settings in force, by section, as JSON values; readable as a settings file."""
        sections = settings_sections(self.plugins)
        tree = {section: dump(self._settings[kind]) for section, kind in sections.items()}
        return {"enable": list(self.enabled), **tree}

    def write_description(self) -> None:
        """Write ``settings.json`` and ``plan.json`` into the run's folder (rank 0)."""
        if self.is_main:
            for name, content in [("settings", self.settings_tree()), ("plan", self.describe())]:
                text = json.dumps(content, indent=2) + "\n"
                replace_file(self.folder / f"{name}.json", text.encode())

    def tell(self, text: str) -> None:
        """Print a line about the run (rank 0 only, to standard error)."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def announce(self, text: str) -> None:
        """Print what was planned or chosen, unless the run is quiet."""
        if not self.quiet:
            self.tell(text)

    def close(self, error: str = "") -> None:
        """Wait for the last checkpoint, tell observers that the run ended, leave the ranks.

        Raises:
            CheckpointError: when the last checkpoint failed.
        """
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        if self._engines is not None:
            self._engines.close()
        try:
            if self._checkpoints is not None:
                self._checkpoints.close()
        except CoreError as failed:
            error = error or str(failed)
            raise
        finally:
            self.emit(RunEnded(error=error))
            for line in self.plugins.observations():
                self.tell(line)
            self.ranks.leave()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close("" if error is None else f"{type(error).__name__}: {error}")


def start(
    file: str | os.PathLike[str] | None = None,
    *,
    enable: Sequence[str] | None = None,
    set: Sequence[str] = (),
    folder: str | os.PathLike[str] = "runs/run",
    resume: bool = False,
    quiet: bool = False,
    plugins: Plugins | None = None,
    ranks: Ranks | None = None,
    **sections: Mapping[str, Any] | Settings,
) -> Run:
    """Find plugins, validate everything, make the plan; or stop with every problem at once.

    Nothing is changed, neither a model nor a file, before all checks have passed. Under ``torchrun``
    the ranks join one process group and compare what they were given.

    Args:
        file: a TOML settings file.
        enable: plugins (``"hello"``) or single transforms (``"hello.freeze"``) that may change models;
            replaces the file's list.
        set: assignments such as ``"hello.depth=5"``.
        folder: where the run keeps its files.
        resume: let recipes go on from the newest checkpoint of ``folder``.
        quiet: do not print the plan and what is chosen.
        plugins: the plugins to use instead of discovering them.
        ranks: this process among its ranks, instead of what ``torchrun`` put into the environment;
            ``Ranks()`` stays alone.
        sections: settings by section, over all other sources: ``checkpoint={"keep": 2}``.

    Raises:
        SettingsError: listing every wrong setting with its source.
        PluginError: for a named plugin that is not active, or ranks that differ.
        PlanError: when the enabled transforms do not fit together.

    Example:
        >>> run = start(checkpoint={"keep": 2}, quiet=True)
        >>> run.plan.ids
        []
        >>> run.close()
    """
    keywords = {name.replace("_", "-"): content for name, content in sections.items()}
    values = gather(file, assignments=set, keywords=keywords)
    if enable is not None:
        values.put(("enable",), list(enable), "keyword argument")
    if plugins is None:
        plugins = discover(disabled=names(values, "disable"))
    enabled = names(values, "enable")
    known = settings_sections(plugins)
    plugins.require(_owners(enabled))
    settings = validate(values, known, why_unknown(plugins))
    require_choices(plugins, settings)
    ranks = ranks or Ranks.from_environment()
    plugins.setup(enabled)
    plugins.forget_observations()
    ranks.join()
    try:
        run = ranks.agree(
            lambda: Run(plugins, settings, enabled, Path(folder), ranks, resume=resume, quiet=quiet)
        )
        ranks.require_same(_facts(run))
    except BaseException:
        ranks.leave()
        raise
    atexit.register(run.close)
    run.announce(f"plan: {', '.join(run.plan.ids) or 'no transforms'}")
    run.emit(RunStarted())
    return run


def _owners(enabled: Sequence[str]) -> list[str]:
    """Plugins of enabled plugins and transforms, each once, in the user's order."""
    return list(dict.fromkeys(name.partition(".")[0] for name in enabled))


def _facts(run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = {"hook API": hooks.API, "enabled plugins": run.enabled}
    for plugin in run.plugins.active:
        facts[plugin.distribution or plugin.name] = plugin.version
    for section, content in run.settings_tree().items():
        if isinstance(content, dict):
            facts |= {f"{section}.{key}": value for key, value in content.items()}
    return facts
