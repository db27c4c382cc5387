"""Core's health checks: is everything installed as it should be, and what is there to work with."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import (
    Distribution,
    distributions,
    entry_points,
    packages_distributions,
)
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from core import hooks
from core.contributions import Reading
from core.discovery import BUILTIN
from core.disk import nearest_existing
from core.hooks import Hooks
from core.plugins import Plugin, State

if TYPE_CHECKING:
    from core.run import Run

_SPECS: tuple[Callable[[Hooks], Iterable[object]], ...] = (
    Hooks.core_settings,
    Hooks.core_checkpoints,
    Hooks.core_engines,
    Hooks.core_models,
    Hooks.core_recipes,
    Hooks.core_commands,
    Hooks.core_probes,
)
_EXTRAS = ("torch", "transformers", "tokenizers", "numpy", "matplotlib")


def installation(run: Run) -> Iterator[Reading]:
    """Plugins and their states, core's own identity, hidden metadata, missing extras."""
    for spec in _SPECS:
        run.plugins.collect_safely(spec)
    for plugin in run.plugins:
        if plugin.name != BUILTIN:
            yield _plugin(plugin)
    yield _identity()
    yield from _hidden_entry_points()
    yield _shadow(Path.cwd())
    missing = [name for name in _EXTRAS if find_spec(name) is None]
    yield Reading(
        name="core[torch]",
        status="warn" if missing else "ok",
        value=f"missing: {', '.join(missing)}" if missing else "installed",
        advice='training and serving need `pip install "core[torch]"`' if missing else "",
    )


def machine(run: Run) -> Iterator[Reading]:
    """Interpreter, processors, accelerator, and room for checkpoints."""
    yield Reading(name="python", status="ok", value=sys.version.split()[0])
    yield Reading(name="processors", status="ok", value=str(_processors()))
    if find_spec("torch") is not None:
        import torch

        yield Reading(name="torch", status="ok", value=torch.__version__)
        yield Reading(name="device", status="ok", value=str(run.device))
    folder = nearest_existing(run.folder)
    free = shutil.disk_usage(folder).free / 2**30
    yield Reading(
        name=f"free space at {folder}",
        status="ok" if free > 1 else "warn",
        value=free,
        unit="GiB",
        advice="" if free > 1 else "checkpoints may not fit",
    )


def _processors() -> int:
    """Processors that this process may use, where the system tells them from all there are."""
    own = getattr(os, "sched_getaffinity", None)
    return len(own(0)) if own else os.cpu_count() or 1


def _plugin(plugin: Plugin) -> Reading:
    bad = plugin.state in (State.BROKEN, State.CONFLICT, State.INCOMPATIBLE)
    advice = f"reinstall or remove {plugin.distribution}" if bad else ""
    remark = plugin.state is State.ACTIVE and plugin.reason
    return Reading(
        name=f"plugin {plugin.name}",
        status="fail" if bad else "warn" if remark else "ok",
        value=f"{plugin.state}: {plugin.reason}" if plugin.reason else str(plugin.state),
        advice=advice,
    )


def _identity() -> Reading:
    """Whether the installed distribution called ``core`` is this package and not a stranger's."""
    owners = sorted(set(packages_distributions().get("core", ())))
    found = next(iter(distributions(name="core")), None)
    files = [str(file) for file in (found.files if found else None) or ()]
    holds = any(file == "core/hooks.py" or file.endswith(".pth") for file in files)
    ours = owners in (["core"], []) and (holds or not files)
    return Reading(
        name="distribution of the package core",
        status="ok" if ours else "fail",
        value=", ".join(owners) or "a source tree",
        advice="" if ours else "another distribution installs a package called core; remove it",
    )


def _hidden_entry_points() -> Iterator[Reading]:
    """Plugins whose entry points are hidden by older metadata earlier on the path."""
    seen = {(p.name, p.value) for p in entry_points(group=hooks.GROUP)}
    first: dict[str, Distribution] = {}
    for distribution in distributions():
        key = re.sub(r"[-_.]+", "-", distribution.name or "").lower()
        visible = first.setdefault(key, distribution)
        for point in distribution.entry_points:
            if point.group == hooks.GROUP and (point.name, point.value) not in seen:
                path = Path(str(visible.locate_file("")))
                yield Reading(
                    name=f"plugin {point.name}",
                    status="fail",
                    value=f"hidden by older metadata of {distribution.name} in {path}",
                    advice=f"uninstall {distribution.name} there",
                )


def _shadow(folder: Path) -> Reading:
    """A file or folder called ``core`` in the working folder is imported instead of the package."""
    found = [folder / name for name in ("core.py", "core") if (folder / name).exists()]
    real = [path for path in found if path.is_file() or any(path.glob("*.py"))]
    own = Path(__file__).resolve().parent
    shadows = [path for path in real if path.resolve() != own]
    return Reading(
        name="names in the working folder",
        status="warn" if shadows else "ok",
        value=f"{shadows[0]} hides the package in scripts started here" if shadows else "free",
        advice="rename it; its sign is \"No module named 'core.hooks'\"" if shadows else "",
    )
