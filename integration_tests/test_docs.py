"""The documentation is true: its code runs, its commands exist, its lists are complete."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from workspace import ROOT, Page, packages, pages

import core
from core.cli import cli
from core.contributions import MODEL, Transform
from core.discovery import discover
from core.errors import CoreError
from core.events import RunStarted
from core.hooks import Hooks
from core.plan import Plan
from core.plugins import Contributed
from core.run import start
from core.sections import settings_sections
from core.testing.fixtures import plugin_of

HOOKS = [name for name in vars(Hooks) if name.startswith("core_")]
each_page = pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
WITH_CODE = [path for path in pages() if path.parent.name == "docs" and Page(path).blocks("python")]


@pytest.fixture(name="names")
def _names() -> Iterator[dict[str, Any]]:
    """The namespace of a real module, as the code of a page would have."""
    module = ModuleType("page")
    sys.modules["page"] = module
    yield vars(module)
    del sys.modules["page"]


@pytest.fixture(name="built", scope="module")
def _built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    html = tmp_path_factory.mktemp("html")
    command = ["sphinx", "-nWq", "--keep-going", "-b", "html", "-d", html / "cache", "docs", html]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return html


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    path: Path,
    names: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    page = Page(path)
    for block in page.blocks("python"):
        page.run(names, block)
    printed = capsys.readouterr().out
    for shown in page.blocks("text"):
        if "fix:" in shown or "cannot be used" in shown:
            assert shown in printed


@each_page
def test_links_lead_somewhere(path: Path) -> None:
    for link in Page(path).links():
        assert link.exists(), link


@each_page
def test_commands_are_understood(path: Path) -> None:
    parent = click.Context(cli, **cli.context_settings)
    for arguments in Page(path).commands():
        _, command, rest = cli.resolve_command(parent, arguments)
        assert command is not None
        # Parses the arguments, and does not run the command.
        command.make_context(command.name, rest, parent=parent)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_documented(name: str, built: Path) -> None:
    assert getattr(Hooks, name).__doc__
    assert f'id="core.hooks.Hooks.{name}"' in (built / "hooks.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_tested(name: str) -> None:
    tests = [path.read_text("utf-8") for p in packages() for path in p.glob("tests/**/*.py")]
    assert any(name in text for text in tests)


def test_every_setting_is_documented(built: Path) -> None:
    html = (built / "settings.html").read_text(encoding="utf-8")
    for section, kind in settings_sections(discover()).items():
        assert f"[{section}]" in html
        for field in fields(kind):
            assert f">{field.name}<" in html


def test_every_command_is_documented(built: Path) -> None:
    html = (built / "cli.html").read_text(encoding="utf-8")
    for name in cli.list_commands(click.Context(cli)):
        assert f'id="core-{name}"' in html


def test_every_public_name_is_documented(built: Path) -> None:
    html = "".join((built / page).read_text("utf-8") for page in ("reference.html", "hooks.html"))
    undocumented = {"__version__", "hookimpl", "override", "Event"}
    for name in set(core.__all__) - undocumented:
        value = getattr(core, name)
        home = getattr(value, "__module__", "core.hooks")
        home = home if home.startswith("core.") else "core.contributions"
        assert f'id="{home}.{name}"' in html or f'id="core.hooks.{name}"' in html, name


# What errors.md quotes, made to happen.


def offer(id: str, **fields: Any) -> Contributed[Transform[Any]]:
    plugin, _, name = id.partition(".")
    transform = Transform(stage=MODEL, name=name, apply=nothing, **fields)
    return Contributed(plugin, transform)


def nothing(subject: object, run: object) -> None:
    return None


class Failing(Hooks):
    """An observer that fails."""

    @core.hookimpl
    def core_event(self, run: core.Run, event: core.Event) -> None:
        raise ValueError("observer")


class Misspelled(Hooks):
    """A hook that is none."""

    @core.hookimpl
    def core_command(self) -> None:
        """Nothing."""


class Unmarked(Hooks):
    """A hook without its mark."""

    def core_probes(self) -> Any:
        return ()


def wrong_settings(folder: Path) -> None:
    file = folder / "run.toml"
    file.write_text("[fp7]\nbits = 7\n[checkpoint]\nkeep = -1\nkeeep = 2\n", encoding="utf-8")
    start("run.toml", set=["train.steps=many"])


def same_folder_twice(folder: Path) -> None:
    with start(folder="runs/mine") as first, start(folder="runs/mine") as second:
        first.save({"epoch": 1}, 1).durable()
        second.save({"epoch": 2}, 2)


CLAIM = frozenset({"attention"})
QUOTED = {
    "claims": lambda _: Plan.build(
        [offer("fpdt.attention", claims=CLAIM), offer("other.attention", claims=CLAIM)]
    ),
    "circle": lambda _: Plan.build([offer("a.x", after=("b.y",)), offer("b.y", after=("a.x",))]),
    "nothing": lambda _: Plan.build([offer("fp6.linear")]).apply(MODEL, object(), None),
    "settings": wrong_settings,
    "misspelled": lambda _: plugin_of(Misspelled(), "demo"),
    "unmarked": lambda _: plugin_of(Unmarked(), "demo"),
    "no checkpoint": lambda _: start(folder="runs/mine").load({}),
    "in use": same_folder_twice,
}


@pytest.mark.parametrize("case", QUOTED)
def test_a_quoted_message_is_the_real_one(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CoreError) as caught:
        QUOTED[case](tmp_path)
    assert str(caught.value).split("\n  fix:")[0] in Page(ROOT / "docs/errors.md").text


def test_an_observer_that_fails_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    plugins = plugin_of(Failing(), "demo")
    for _ in range(3):
        plugins.notify(None, RunStarted())
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert plugins.event_errors == {"demo": 3}
