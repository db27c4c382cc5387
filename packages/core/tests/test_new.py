"""``core new``: what it writes works untouched, and what it refuses leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core.cli.new import words_for, write_package
from core.errors import CoreError

if TYPE_CHECKING:
    from conftest import Site


AREAS = [f"--only={a}" for a in ("metadata", "contributions", "settings", "commands", "probes")]
"""What ``core check`` looks at here; the tests of the new package look at the rest."""


class Environment:
    """A fresh environment with the new package installed, beside what this one has."""

    def __init__(self, folder: Path) -> None:
        uv = shutil.which("uv")
        venv.create(folder / "env", with_pip=uv is None, symlinks=True)
        self.folder = folder
        self.python = folder / "env" / "bin" / "python"
        # What is installed here is seen there: nothing is downloaded.
        (site,) = (folder / "env" / "lib").glob("python*/site-packages")
        here = sysconfig.get_paths()["purelib"]
        (site / "beside.pth").write_text(f"import site; site.addsitedir({here!r})\n")
        self.package = write_package("core-hello", folder)
        install = [uv, "pip", "install", "--offline", "--python", str(self.python)]
        if uv is None:
            install = [str(self.python), "-m", "pip", "install", "--no-index"]
        options = ["--no-deps", "--no-build-isolation", "--quiet", str(self.package)]
        self.installed = self._run(*install, *options)

    def core(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self._run(str(self.python), "-P", "-m", "core", *args)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CORE_", "PYTHON"))}
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**kept, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("new"))
    assert made.installed.returncode == 0, made.installed.stderr
    return made


@pytest.mark.slow
def test_new_package_keeps_the_contract(environment: Environment) -> None:
    ended = environment.core("check", "hello", "--json", *AREAS)
    found = json.loads(ended.stdout)
    assert (ended.returncode, [row for row in found if row["status"] != "ok"]) == (0, [])
    assert {"metadata.entry-point", "commands.light"} <= {row["check"] for row in found}


@pytest.mark.slow
def test_new_package_is_found_and_does_its_work(environment: Environment) -> None:
    listed = json.loads(environment.core("plugins", "--json").stdout)["plugins"]
    assert ("hello", "active") in [(row["name"], row["state"]) for row in listed]
    planned = environment.core("plan", "--enable", "hello")
    assert "hello.freeze" in planned.stdout
    checked = environment.core("doctor", "hello", "--json")
    assert [row["status"] for row in json.loads(checked.stdout)] == ["ok"]


@pytest.mark.slow
def test_new_command_reads_a_file(environment: Environment) -> None:
    import torch
    from safetensors.torch import save_file

    file = environment.folder / "model.safetensors"
    save_file({"a.bias": torch.zeros(2), "a.weight": torch.zeros(2, 2)}, file)
    ended = environment.core("hello", str(file), "--freeze", "*.bias")
    assert (ended.stdout, ended.stderr) == ("a.bias\n", "")


@pytest.mark.slow
def test_new_package_passes_its_own_tests(environment: Environment) -> None:
    """The whole contract is one of them."""
    ended = environment._run(
        str(environment.python), "-m", "pytest", "-q", "-p", "no:cacheprovider",
        "-W", "error", str(environment.package),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "passed" in ended.stdout
    assert "failed" not in ended.stdout


@pytest.mark.parametrize("name", ["core-hello", "core-my-own-thing2"])
def test_new_package_is_tidy(name: str, tmp_path: Path) -> None:
    folder = write_package(name, tmp_path)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    plugin, package = name.removeprefix("core-"), name.replace("-", "_")
    assert project["entry-points"]["core.v1"] == {plugin: f"{package}.plugin:Plugin"}
    assert project["dependencies"] == ["core[torch]>=0.1,<1"]
    assert (folder / "src" / package / "py.typed").is_file()
    for file in folder.rglob("*.py"):
        compile(file.read_text(), str(file), "exec")
    left = [p for p in folder.rglob("*") if "template" in p.name or "__package__" in str(p)]
    assert left == []
    text = "".join(file.read_text() for file in folder.rglob("*") if file.is_file())
    assert "$" not in text.replace("$ ", "")
    ruff = Path(sys.executable).with_name("ruff")
    if ruff.exists():
        for args in (["check"], ["format", "--check"]):
            ended = subprocess.run(
                [ruff, *args, folder], capture_output=True, text=True, check=False
            )
            assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hello", "such as 'core-hello'"),
        ("core-", "must be 'core-' and lower-case words"),
        ("core-Hello", "such as 'core-hello'"),
        ("core-a_b", "such as 'core-a-b'"),
        ("core-2fast", "lower-case words"),
        ("core-a--b", "such as 'core-a-b'"),
        ("core-../etc", "such as 'core-etc'"),
        ("core-train", "is a name of core's own"),
        ("core-core", "core's own"),
        ("core-enable", "core's own"),
        ("core-import", "a word of Python"),
    ],
)
def test_names_that_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CoreError, match=message):
        write_package(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_words() -> None:
    assert words_for("core-my-thing") == {
        "distribution": "core-my-thing",
        "plugin": "my-thing",
        "package": "core_my_thing",
        "keyword": "my_thing",
        "settings": "MyThingSettings",
        "group": "core.v1",
        "requirement": ">=0.1,<1",
    }


def test_existing_folder_is_refused_and_left_alone(site: Site) -> None:
    (site.work / "core-hello").mkdir()
    (site.work / "core-hello" / "mine.txt").write_text("mine")
    ended = site.core("new", "core-hello")
    assert ended.returncode == 2
    assert "core-hello exists already" in ended.stderr
    assert [p.name for p in site.work.rglob("*")] == ["core-hello", "mine.txt"]


def test_command_prints_what_to_do_next(site: Site) -> None:
    ended = site.core("new", "core-hello", "--path", "packages")
    assert ended.returncode == 0, ended.stderr
    assert "wrote packages/core-hello" in ended.stdout
    assert "core check hello" in ended.stdout
    assert (site.work / "packages" / "core-hello" / "README.md").is_file()


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CoreError, match="No space left"):
        write_package("core-hello", tmp_path)
    assert list(tmp_path.iterdir()) == []
