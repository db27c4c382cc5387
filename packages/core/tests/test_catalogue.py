"""The catalogue of first-party packages agrees with the packages that exist."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from core.catalogue import not_installed, packages
from core.discovery import plugins_from

PACKAGES = Path(__file__).parents[2]


def test_the_catalogue_names_the_packages_of_this_repository() -> None:
    folders = sorted(path.parent.name for path in PACKAGES.glob("core-*/pyproject.toml"))
    if not (PACKAGES / "core").is_dir():
        pytest.skip("these tests are not in the repository")
    assert sorted(package.name for package in packages()) == folders


def test_every_package_is_described() -> None:
    for package in packages():
        assert package.summary
        assert package.plugin == package.name.removeprefix("core-")
        file = PACKAGES / package.name / "pyproject.toml"
        if file.is_file():
            named = tomllib.loads(file.read_text())["project"]["entry-points"]["core.v1"]
            assert list(named) == [package.plugin]


def test_a_recipe_misses_the_packages_that_are_not_installed() -> None:
    missing = not_installed("quickstart", plugins_from({}))
    assert missing == [package for package in packages() if "quickstart" in package.recipes]
