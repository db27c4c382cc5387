"""Stand-in distributions that are really installed, and the command line in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import ClassVar, Self

import pytest

HEAD = """
import click
from core.contributions import BATCH, MODEL, Phase, Probe, Reading, Recipe, Settings, Transform
from core.hooks import Hooks, hookimpl, implements
"""


GOOD = """
class Plugin(Hooks):
    @hookimpl
    def core_probes(self):
        yield Probe(name="fine", summary="Always.", measure=fine)

def fine(run):
    yield Reading(name="fine", status="ok")
"""
"""A plugin that works."""


@dataclass(frozen=True)
class Site:
    """A folder of installed distributions, and processes that see it on their path."""

    folder: Path
    work: Path
    good: ClassVar[str] = GOOD

    @classmethod
    def new(cls, parent: Path) -> Self:
        """An empty one, with an empty folder to work in."""
        made = cls(parent / "installed", parent / "work")
        made.folder.mkdir()
        made.work.mkdir()
        return made

    def install(
        self,
        distribution: str,
        source: str,
        *,
        plugin: str | None = None,
        version: str = "1.0",
        target: str = ":Plugin",
        group: str = "core.v1",
        module: str = "",
        into: str = "",
    ) -> Path:
        """Build a wheel with flit and install it by unpacking, as pip does.

        Args:
            distribution: its name, such as ``core-alpha``.
            source: text of its one module.
            plugin: name of its entry point; the distribution's without ``core-`` by default, and
                an empty string for none.
            version: its version.
            target: what the entry point names, after the module's name.
            group: the entry-point group.
            module: name of the module; made of the distribution's name by default.
            into: a folder below this one, for a second place on the path.
        """
        from flit_core.wheel import make_wheel_in

        name = module or distribution.replace("-", "_")
        entry = distribution.removeprefix("core-") if plugin is None else plugin
        lines = f'[project.entry-points."{group}"]\n{entry} = "{name}{target}"' if entry else ""
        folder = self.folder / into
        folder.mkdir(exist_ok=True, parents=True)
        with tempfile.TemporaryDirectory() as text:
            project = Path(text)
            file = project.joinpath(*name.split(".")).with_suffix(".py")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(HEAD + dedent(source) if entry else dedent(source), encoding="utf-8")
            (project / "pyproject.toml").write_text(
                '[build-system]\nrequires = ["flit_core"]\nbuild-backend = "flit_core.buildapi"\n'
                f'[project]\nname = "{distribution}"\nversion = "{version}"\ndescription = "x"\n'
                f'[tool.flit.module]\nname = "{name}"\n{lines}\n',
                encoding="utf-8",
            )
            wheel = make_wheel_in(project / "pyproject.toml", project).file
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        return folder

    def python(
        self, *args: str, path: tuple[str, ...] = ("",), env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the interpreter of this test with the folder on its path."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CORE_", "_CORE"))}
        places = [str(self.folder / place) for place in path]
        kept["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [kept.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, *args],
            cwd=self.work,
            env={**kept, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200", **(env or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def core(
        self, *args: str, path: tuple[str, ...] = ("",), env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line as its console script does, which puts no folder on the path."""
        start = "from core.cli import main; main()"
        return self.python("-P", "-c", start, *args, path=path, env=env)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """An empty folder of installed distributions."""
    return Site.new(tmp_path)


@pytest.fixture(scope="module")
def module_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Like ``site``, for all tests of a module."""
    return Site.new(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Plugins in every state, installed once: see ``STAND_INS`` below."""
    made = Site.new(tmp_path_factory.mktemp("site"))
    for distribution, source in STAND_INS.items():
        made.install(distribution, source)
    made.install("core-twin-a", GOOD, plugin="twin", version="1.1")
    made.install("core-twin-b", GOOD, plugin="twin", version="2.2")
    made.install("core-tomorrow", "raise SystemExit('imported')", group="core.v2")
    made.install("core-yesterday", "raise SystemExit('imported')", group="core.v0")
    made.install("core-stored", GOOD, plugin="core")
    made.install("core-train", GOOD)
    made.install("core-functions", FUNCTIONS, target="")
    return made


FUNCTIONS = """
@implements(Hooks.core_probes)
def probes():
    return ()
"""
"""A plugin that is a module of functions."""

STAND_INS = {
    "core-good": GOOD
    + """
@hookimpl
def core_commands(self):
    yield click.Command("hello", callback=lambda: click.echo("hello"), help="Says hello.")
Plugin.core_commands = core_commands
""",
    "core-fails": "raise ImportError('libfoo.so missing')",
    "core-exits": "import sys; sys.exit(3)",
    "core-prints": "print('welcome to my plugin')\n" + GOOD,
    "core-misspelled": """
class Plugin(Hooks):
    @hookimpl
    def core_command(self):
        return ()
""",
    "core-argument": """
class Plugin(Hooks):
    @hookimpl
    def core_transforms(self, runs):
        return ()
""",
    "core-unmarked": """
class Plugin(Hooks):
    def core_engines(self):
        return ()
""",
    "core-wrapper": """
class Plugin(Hooks):
    @hookimpl(wrapper=True)
    def core_engines(self):
        return (yield)
""",
    "core-empty": "class Plugin(Hooks): pass",
    "core-raising": """
class Plugin(Hooks):
    @hookimpl
    def core_commands(self):
        raise RuntimeError("no commands today")
""",
    "core-thief": """
class Plugin(Hooks):
    @hookimpl
    def core_commands(self):
        yield click.Command("plan")
""",
}
"""Plugins by distribution name; each shows one state."""
