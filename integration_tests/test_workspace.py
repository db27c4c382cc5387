"""The packages agree with each other and with what is said about them."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest
from workspace import ROOT, packages, project

import core
from core import hooks
from core.catalogue import packages as catalogue

each_package = pytest.mark.parametrize("package", packages(), ids=lambda path: path.name)


def module_of(package: Path) -> Path:
    return package / "src" / package.name.replace("-", "_")


def test_all_packages_have_one_version() -> None:
    assert {project(package)["version"] for package in packages()} == {core.__version__}


def test_the_catalogue_lists_the_packages() -> None:
    listed = [package.name for package in catalogue()]
    assert sorted(listed) == [p.name for p in packages() if p.name != "core"]


def test_the_workspace_is_no_package() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "project" not in content
    assert content["tool"]["uv"]["workspace"]["members"] == ["packages/*"]


@each_package
def test_a_package_is_complete(package: Path) -> None:
    assert project(package)["name"] == package.name
    assert (package / "README.md").is_file()
    assert (package / "tests").is_dir()
    assert (module_of(package) / "py.typed").is_file()
    assert f'__version__ = "{core.__version__}"' in (module_of(package) / "__init__.py").read_text()


@each_package
def test_a_package_carries_the_licence(package: Path) -> None:
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert project(package)["license"] == "Apache-2.0"


@each_package
def test_a_plugin_is_called_as_its_folder(package: Path) -> None:
    points = project(package).get("entry-points", {}).get(hooks.GROUP, {})
    target = f"{module_of(package).name}.plugin:Plugin"
    expected = {package.name.removeprefix("core-"): target}
    assert points == ({} if package.name == "core" else expected)


def tracked_text() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_tracked_file_is_bound_to_a_machine() -> None:
    # Written in two parts, so that this file does not hold what it looks for.
    words = [first + second for first, second in (("/ro", "ot/"), ("/ho", "me/"), ("/op", "t/"))]
    words.append("index" + "-url")
    for path in tracked_text():
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert [word for word in words if word in text] == [], path
