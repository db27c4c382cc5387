"""The command line: every command explains itself, prints JSON, and refuses without a traceback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner, Result

from core import discovery
from core.cli import cli, main
from core.hooks import Hooks

if TYPE_CHECKING:
    from conftest import Site

BUILTIN = (
    "bench", "check", "completion", "convert", "doctor", "generate", "hooks", "new", "plan",
    "plugins", "run",
)  # fmt: skip


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder, no variables of ours, and core's own plugin only."""
    monkeypatch.chdir(tmp_path)
    for name in ("CORE_DISABLE", "CORE_STRICT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CORE_NO_PLUGINS", "1")
    discovery._discover.cache_clear()


def call(*args: str) -> Result:
    """Call the command line in this process; its standard error is kept apart."""
    return CliRunner().invoke(cli, list(args), prog_name="core")


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the whole program says when it refuses; it must exit with 2 and print nothing else."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


def test_the_list_of_commands_is_complete() -> None:
    with click.Context(cli) as ctx:
        names = cli.list_commands(ctx)
    assert set(BUILTIN) <= set(names)


@pytest.mark.parametrize("name", BUILTIN)
def test_every_command_has_help_with_an_example(name: str) -> None:
    shown = call(name, "--help")
    assert shown.exit_code == 0
    assert re.search(rf"Example:\n(?:.*\n)*?\s+(?:core|torchrun .* core) {name}", shown.output)
    assert call(name, "-h").output == shown.output


@pytest.mark.parametrize("name", BUILTIN)
def test_every_option_and_command_says_what_it_does(name: str) -> None:
    with click.Context(cli) as ctx:
        command = cli.get_command(ctx, name)
        assert command is not None
        assert command.get_short_help_str()
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, option.name


def test_without_arguments_the_help_is_shown() -> None:
    assert "core run quickstart" in call("--help").output
    assert "Usage: core" in (call().output + call().stderr)
    assert call("--version").output.startswith("core, version ")


@pytest.mark.parametrize(
    "args",
    [
        ["plugins"],
        ["hooks"],
        ["plan"],
        ["doctor", "core.installation"],
        ["bench", "core.hooks"],
    ],
)
def test_json_is_all_that_is_printed(args: list[str]) -> None:
    shown = call(*args, "--json")
    assert shown.exit_code in ((0, 1) if args[0] == "doctor" else (0,)), shown.output
    assert json.loads(shown.stdout)


def test_plugins_lists_cores_own_first() -> None:
    found: dict[str, Any] = json.loads(call("plugins", "--json").stdout)
    assert found["api"] == 1
    assert found["plugins"][0]["name"] == "core"
    assert found["plugins"][0]["state"] == "active"
    assert call("plugins").output.splitlines()[0].split() == [
        "NAME", "STATE", "DISTRIBUTION", "VERSION", "REASON",
    ]  # fmt: skip


def test_hooks_lists_every_hook_with_who_implements_it() -> None:
    rows = {row["hook"]: row for row in json.loads(call("hooks", "--json").stdout)["hooks"]}
    assert list(rows) == [name for name in vars(Hooks) if name.startswith("core_")]
    assert rows["core_engines"]["plugins"] == ["core"]
    assert rows["core_event"]["plugins"] == []
    assert all(row["summary"].endswith(".") for row in rows.values())
    assert "core_engines" in call("hooks").output


def test_plan_shows_the_settings_in_force_and_where_nothing_is_enabled(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[checkpoint]\nkeep = 7\n")
    shown = call("plan", "--settings", "run.toml", "--set", "checkpoint.format=dcp")
    assert shown.exit_code == 0
    assert "no transforms: no plugin is enabled" in shown.output
    assert "keep = 7" in shown.output
    assert "format = 'dcp'" in shown.output
    assert list(tmp_path.iterdir()) == [tmp_path / "run.toml"]


def test_doctor_shows_core_and_the_machine() -> None:
    shown = call("doctor", "core")
    for name in ("distribution of the package core", "python", "processors", "free space"):
        assert name in shown.output


def test_bench_of_the_hooks_gives_ratios() -> None:
    rows = json.loads(call("bench", "core.hooks", "--json").stdout)
    assert {row["unit"] for row in rows} == {"x"}
    assert all(row["value"] > 0 and row["limit"] for row in rows)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["plguins"], "no command 'plguins'; did you mean 'plugins'?"),
        (["plan", "--enable", "no-such"], "no plugin 'no-such' is installed"),
        (["plan", "--set", "checkpoint.keep"], "not of the form section.key=value"),
        (["plan", "--set", "checkpoint.keep=-1"], "checkpoint.keep = -1"),
        (["plan", "--set", "chekpoint.keep=1"], "did you mean 'checkpoint'?"),
        (["plan", "--settings", "missing.toml"], "cannot read settings file missing.toml"),
        (["plan", "--sett", "x"], "No such option"),
        (["plan", "surplus"], "unexpected extra argument"),
        (["doctor", "core.machin"], "no probe 'core.machin'; did you mean 'core.machine'?"),
        (["bench", "core.machine"], "no probe 'core.machine'"),
        (["run", "quikstart"], "no recipe 'quikstart'; did you mean 'quickstart'?"),
        (["run", "train", "--enable", "no-such"], "no plugin 'no-such' is installed"),
        (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
    ],
)
def test_bad_input_is_refused(
    capsys: pytest.CaptureFixture[str], args: list[str], said: str
) -> None:
    assert said.lower() in refused(capsys, *args).lower()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_what_their_shells_read(tmp_path: Path, shell: str) -> None:
    shown = call("completion", shell)
    assert shown.exit_code == 0
    assert f"_CORE_COMPLETE={shell}_complete" in shown.output
    if shutil.which(shell):
        (tmp_path / "script").write_text(shown.output)
        checked = subprocess.run([shell, "-n", "script"], capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("words", "offered"),
    [("core pl", {"plan", "plugins"}), ("core run quick", {"quickstart"}), ("core x", set())],
)
def test_completion_offers_commands_and_recipes(site: Site, words: str, offered: set[str]) -> None:
    count = str(len(words.split()) - 1)
    asked = {"_CORE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
    shown = site.core(env={**asked, "CORE_NO_PLUGINS": "1"})
    assert {line.partition(",")[2] for line in shown.stdout.split()} == offered


def test_help_leaves_out_the_commands_of_plugins_that_are_left_out(shared_site: Site) -> None:
    assert "hello" in shared_site.core("--help").stdout
    assert "hello" not in shared_site.core("--no-plugin", "good", "--help").stdout
    assert "hello" not in shared_site.core("--no-plugins", "--help").stdout


def test_module_and_script_are_the_same_program(site: Site) -> None:
    shown = site.python("-m", "core", "--version")
    assert shown.stdout == site.core("--version").stdout
    assert shown.returncode == 0
