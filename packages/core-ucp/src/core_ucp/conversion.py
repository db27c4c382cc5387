"""Conversions: a view of any source, a target of any kind, and the plan between them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoints.settings import CheckpointSettings
from core.contributions import CheckpointFormat, ParameterRules, Progress
from core.errors import CheckpointError, closest
from core.hooks import Hooks
from core.plugins import Contributed, Plugins
from core.storage import ByteSink
from core_ucp.execution.copying import OpenSink, execute
from core_ucp.execution.estimating import bytes_per_second
from core_ucp.execution.planning import Plan, plan
from core_ucp.settings import UcpSettings
from core_ucp.sources.registry import named
from core_ucp.targets.registry import target_of
from core_ucp.view.view import View

if TYPE_CHECKING:
    from core.run import Run
    from core_ucp.layout.rules import Rules


@dataclass(frozen=True)
class Planned:
    """A conversion that has been planned and proven; satisfies core's ``Converter``.

    Attributes:
        plan: of all copies.
        open_sink: what carries the bytes into a folder.
        workers: threads that copy, or ``None`` for the usual number.
        seconds: of processor time that planning took.
    """

    plan: Plan
    open_sink: OpenSink
    workers: int | None
    seconds: float

    @property
    def tensors(self) -> int:
        return len({wanted.key for wanted in self.plan.target.wanted})

    @property
    def nbytes(self) -> int:
        return self.plan.nbytes

    @property
    def skipped(self) -> Sequence[str]:
        return sorted(self.plan.view.atoms.keys() - {w.key for w in self.plan.target.wanted})

    @property
    def remarks(self) -> Sequence[str]:
        return self.plan.target.remarks

    def describe(self) -> Mapping[str, Any]:
        """What a dry run shows."""
        return {
            "framework": self.plan.view.framework,
            "mesh": dict(self.plan.view.mesh),
            "files": len(self.plan.target.files),
            "copies": sum(len(copies.parts) for copies in self.plan.copies),
            "planned in processor seconds": round(self.seconds, 3),
            "estimated seconds": round(self.nbytes / bytes_per_second(self.plan), 1),
        }

    def write(self, folder: Path, progress: Progress) -> None:
        execute(
            self.plan,
            folder,
            open_sink=self.open_sink,
            progress=lambda size: progress("", size),
            workers=self.workers,
        )


def planned(source: Path, fmt: CheckpointFormat, run: Run, *, to: str) -> Planned:
    """Plan a conversion: what the formats of this package give to core.

    Args:
        source: file or folder.
        fmt: the format that was found there.
        run: whose settings are heeded.
        to: name of the target.

    Raises:
        CheckpointError: when the source is damaged or incomplete, or cannot be brought into the
            target's form.
    """
    started = time.process_time()
    wanted = run.settings(UcpSettings)
    view = open_view(source, fmt, run)
    made = plan(view, target_of(to, view, wanted))
    seconds = time.process_time() - started
    return Planned(made, _sink(run), wanted.workers or None, seconds)


def _sink(run: Run) -> OpenSink:
    def opened(folder: Path) -> ByteSink:
        return run.checkpoints.storage(folder).value.sink(folder)

    return opened


def open_view(path: Path, fmt: CheckpointFormat, run: Run) -> View:
    """Open a checkpoint as the view that its format, or the format that it extends, has.

    Raises:
        CheckpointError: when nobody knows where the tensors of such a checkpoint lie.
    """
    kind = fmt.name if named(fmt.name) else fmt.extends.rpartition(".")[2]
    if named(kind) is None:
        raise CheckpointError(
            f"{path} is {fmt.name}, of which only its own reader knows where tensors lie",
            fix="convert it to dcp or safetensors first",
        )
    return opened(path, kind, run)


def opened(path: Path, name: str, run: Run) -> View:
    """Open a checkpoint of the kind ``name``.

    Raises:
        CheckpointError: when it is damaged or incomplete.
    """
    source = named(name)
    if source is None:
        raise CheckpointError(f"no kind of checkpoint is called {name!r}")
    return source.open(path, rules_of(run))


def rules_of(run: Run) -> Rules | None:
    """The rules that the settings name, if they name some.

    Raises:
        CheckpointError: for an unknown name, or a file that is missing or wrong.
    """
    name = run.settings(CheckpointSettings).rules
    return rules_named(name, run.plugins) if name else None


def rules_named(name: str, plugins: Plugins) -> Rules:
    """The rules that a plugin brings under a name, or else those of a file.

    Raises:
        CheckpointError: when there are none, or two, or they are wrong.
    """
    from core_ucp.layout.toml import load, rules_from

    brought = [
        Contributed(c.plugin, c.value)
        for c in plugins.collect(Hooks.core_models)
        if isinstance(c.value, ParameterRules)
    ]
    same = [c for c in brought if name in (c.value.name, c.id)]
    if len(same) > 1:
        ids = " and ".join(c.id for c in same)
        raise CheckpointError(f"the rules {name!r} are brought by {ids}", fix="use the full id")
    if same:
        return rules_from(same[0].value.tables(), f"the rules {same[0].id}")
    if not Path(name).exists():
        known = [c.value.name for c in brought]
        listed = f"plugins bring {', '.join(known) or 'none'}{closest(name, known)}"
        raise CheckpointError(f"there are no rules {name!r}", why=f"it is no file, and {listed}")
    return load(Path(name))
