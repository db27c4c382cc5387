"""The command line starts without torch, pydantic or rich, however many plugins are installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Site

HEAVY = ("torch", "numpy", "transformers", "pydantic", "rich", "safetensors", "tokenizers")
THIN = """
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
    bits: int = 6

class Plugin(Hooks):
    @hookimpl
    def core_settings(self):
        yield Demo

    @hookimpl
    def core_transforms(self, run):
        yield Transform(stage=MODEL, name="same", apply=change)

    @hookimpl
    def core_commands(self):
        yield click.Command("use-{name}", callback=work, help="Does the work.")

def change(model, run):
    import torch
    return model

def work():
    import torch
"""
PROGRAM = """
import sys
try:
    {start}
except SystemExit as ended:
    assert not ended.code, ended.code
print("loaded:", *(name for name in {heavy!r} if name in sys.modules))
"""


@pytest.fixture(scope="module")
def thin(module_site: Site) -> Site:
    for index in range(10):
        source = THIN.replace("{name}", str(index))
        module_site.install(f"core-thin{index}", source)
    return module_site


def loaded(site: Site, start: str) -> tuple[str, list[str]]:
    ended = site.python("-P", "-c", PROGRAM.format(start=start, heavy=HEAVY))
    assert ended.returncode == 0, ended.stderr
    shown, _, names = ended.stdout.rpartition("loaded:")
    return shown, names.split()


@pytest.mark.parametrize("args", [["--help"], ["plugins"], ["hooks"], ["plugins", "--json"]])
def test_the_command_line_with_ten_plugins_loads_nothing_heavy(thin: Site, args: list[str]) -> None:
    shown, names = loaded(thin, f"from core.cli import main; main({args!r})")
    assert names == []
    assert all(f"thin{index}" in shown or f"use-{index}" in shown for index in range(10))


@pytest.mark.parametrize("command", ["run --help", "plan --help", "doctor --help", "use-3 --help"])
def test_help_of_a_command_loads_nothing_heavy(thin: Site, command: str) -> None:
    shown, names = loaded(thin, f"from core.cli import main; main({command.split()!r})")
    assert "Usage: core" in shown
    assert names == []


@pytest.mark.parametrize(
    "start",
    [
        "import core",
        "import core; core.Hooks, core.Transform, core.Run, core.Plan, core.Engine, core.hookimpl",
        "import core; core.discover().active",
    ],
)
def test_importing_core_loads_nothing_heavy(thin: Site, start: str) -> None:
    assert loaded(thin, start)[1] == []


def test_importing_core_loads_nothing_of_core_either(thin: Site) -> None:
    ended = thin.python(
        "-c", "import core, sys; print([m for m in sys.modules if m[:5] == 'core.'])"
    )
    assert ended.stdout == "[]\n"


def test_a_plan_needs_no_torch(thin: Site) -> None:
    start = "from core.cli import main; main(['plan', '--enable', 'thin3'])"
    shown, names = loaded(thin, start)
    assert "thin3.same" in shown
    assert "torch" not in names
    assert "transformers" not in names


WITHOUT_TORCH = """
import importlib.util, sys
real, gone = importlib.util.find_spec, ("torch", "numpy", "transformers")
importlib.util.find_spec = lambda name, package=None: None if name in gone else real(name, package)
sys.modules.update(dict.fromkeys(gone))
from core.cli import main
main(["doctor"])
"""


def test_doctor_works_without_torch(thin: Site) -> None:
    ended = thin.python("-P", "-c", WITHOUT_TORCH)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "missing: torch, transformers, numpy" in ended.stdout
