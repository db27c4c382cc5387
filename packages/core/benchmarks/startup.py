"""What starting core costs, in multiples of a bare interpreter.

Every figure is processor time (user and system) of whole processes, the minimum of interleaved
repeats, divided by that of ``python -c pass`` from the same interleaving. Plugins are thin stand-ins
that are built as wheels and installed by unpacking::

    python packages/core/benchmarks/startup.py --repeats 12
    python packages/core/benchmarks/startup.py --json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

PLUGIN = """
from dataclasses import dataclass
import click
from core.contributions import MODEL, Settings, Transform
from core.hooks import Hooks, hookimpl

@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
    bits: int = 6

class Plugin(Hooks):
    @hookimpl
    def core_settings(self):
        yield Demo

    @hookimpl
    def core_transforms(self, run):
        yield Transform(stage=MODEL, name="same", apply=same)

    @hookimpl
    def core_commands(self):
        yield click.Command("{name}", callback=work, help="Does the work.")

def same(model, run):
    return model

def work():
    pass
"""
PROJECT = """
[build-system]
requires = ["flit_core"]
build-backend = "flit_core.buildapi"
[project]
name = "core-{name}"
version = "1.0"
description = "A thin plugin."
[tool.flit.module]
name = "core_{name}"
[project.entry-points."core.v1"]
{name} = "core_{name}:Plugin"
"""
CLI = "from core.cli import main; main({!r})"


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=12, help="Processes of each kind.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = processes(Path(name), given.repeats) | in_process()
    report = {"conditions": conditions(given.repeats), "figures": figures}
    if given.json:
        print(json.dumps(report, indent=2))
        return
    for key, value in report["conditions"].items():
        print(f"{key}: {value}")
    print(f"\n{'WHAT':<44}{'OURS':>12}{'PLAIN':>12}{'RATIO':>9}")
    for what, row in figures.items():
        print(f"{what:<44}{row['ours']:>12.4g}{row['plain']:>12.4g}{row['ratio']:>9.4g}")


def processes(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of whole processes against a bare interpreter."""
    cases: dict[str, tuple[str, int]] = {
        "python -c pass": ("pass", 0),
        "import core": ("import core", 0),
    }
    cases["import core.hooks, core.contributions"] = ("import core.hooks, core.contributions", 0)
    cases["import click, importlib.metadata"] = ("import click, importlib.metadata", 0)
    for count in (0, 10, 50):
        for command in ("--help", "plugins"):
            cases[f"core {command}, {count} plugins"] = (CLI.format([command]), count)
    sites = {count: install(folder / str(count), count) for count in (0, 10, 50)}
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(repeats + 1):  # the first round writes the byte code
        for what, (program, count) in cases.items():
            best[what] = min(best[what], 1000 * processor_seconds(program, sites[count]))
    plain = best.pop("python -c pass")
    return {w: {"ours": ms, "plain": plain, "ratio": ms / plain} for w, ms in best.items()}


def install(folder: Path, count: int) -> Path:
    """Build and unpack ``count`` thin plugins."""
    from flit_core.wheel import make_wheel_in

    folder.mkdir()
    for index in range(count):
        name = f"thin{index}"
        with tempfile.TemporaryDirectory() as text:
            project = Path(text)
            (project / "pyproject.toml").write_text(PROJECT.format(name=name))
            (project / f"core_{name}.py").write_text(PLUGIN.replace("{name}", name))
            with zipfile.ZipFile(make_wheel_in(project / "pyproject.toml", project).file) as wheel:
                wheel.extractall(folder)
    return folder


def processor_seconds(program: str, site: Path) -> float:
    """User and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(site)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_process() -> dict[str, dict[str, float]]:
    """Microseconds of a hook call, an event and a plan, against plain Python doing the same."""
    from core.contributions import Stage, Transform
    from core.discovery import plugins_from
    from core.events import StepEnded
    from core.hooks import Hooks, hookimpl
    from core.plan import Plan
    from core.plugins import Contributed

    class Observer(Hooks):
        @hookimpl
        def core_event(self, run: Any, event: Any) -> None:
            pass

        @hookimpl
        def core_transforms(self, run: Any) -> Any:
            return ()

    observers = [Observer() for _ in range(10)]
    plugins = plugins_from({f"p{index}": one for index, one in enumerate(observers)})
    event, run = StepEnded(step=1), None
    stage: Stage[Any] = Stage("benchmark")
    one = Transform(stage=stage, name="t", apply=same)
    ids = [f"p{index:03}" for index in range(100)]
    many = [
        Contributed(id, replace(one, after=(f"{before}.t",) if index else ()))
        for index, (id, before) in enumerate(zip(ids, ["", *ids], strict=False))
    ]
    return compare(
        {
            "event to 10 observers (us)": (
                lambda: plugins.notify(run, event),  # type: ignore[arg-type]
                lambda: [observer.core_event(run, event) for observer in observers],
            ),
            "collect from 10 plugins (us)": (
                lambda: plugins.collect(Hooks.core_transforms, run),  # type: ignore[arg-type]
                lambda: [observer.core_transforms(run) for observer in observers],
            ),
            "plan of 100 chained transforms (us)": (
                lambda: Plan.build(many),
                lambda: sorted(many, key=lambda found: found.id),
            ),
        }
    )


def same(subject: Any, run: Any) -> Any:
    """Change nothing."""
    return subject


def compare(
    cases: Mapping[str, tuple[Callable[[], object], Callable[[], object]]],
) -> dict[str, dict[str, float]]:
    """Interleaved minimum of both sides."""
    found = {}
    for what, sides in cases.items():
        best = [float("inf"), float("inf")]
        for _ in range(15):
            for side, work in enumerate(sides):
                best[side] = min(best[side], per_call(work))
        found[what] = {"ours": best[0], "plain": best[1], "ratio": best[0] / best[1]}
    return found


def per_call(work: Callable[[], object], calls: int = 200) -> float:
    """Microseconds of processor time."""
    began = time.process_time()
    for _ in range(calls):
        work()
    return 1e6 * (time.process_time() - began) / calls


def conditions(repeats: int) -> dict[str, str]:
    """What the figures depend on."""
    names: Sequence[str] = ("pluggy", "click")
    return {
        "python": sys.version.split()[0],
        **{name: version(name) for name in names},
        "distributions installed": str(sum(1 for _ in distributions())),
        "processors": str(os.cpu_count()),
        "repeats": str(repeats),
        "load average": f"{os.getloadavg()[0]:.1f}",
    }


if __name__ == "__main__":
    main()
