"""Discovery in one process: from installed metadata to plugins, once, in one order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from typing import TYPE_CHECKING

import pytest

import core
from core import discovery
from core.hooks import Hooks
from core.plugins import State

if TYPE_CHECKING:
    from conftest import Site

LEAVES_A_TRACE = "import os; os.environ['TRACE'] = os.environ.get('TRACE', '') + __name__ + ' '\n"


@pytest.fixture
def on_path(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The folder of stand-ins on the path of this process; discovery starts anew."""
    monkeypatch.syspath_prepend(str(site.folder))
    monkeypatch.setenv("TRACE", "")
    for name in ("CORE_DISABLE", "CORE_NO_PLUGINS", "CORE_STRICT"):
        monkeypatch.delenv(name, raising=False)
    discovery._discover.cache_clear()
    before = set(sys.modules)
    yield site
    for name in set(sys.modules) - before:
        if name.startswith("core_"):
            del sys.modules[name]
    discovery._discover.cache_clear()
    invalidate_caches()


def test_a_process_discovers_once(on_path: Site) -> None:
    on_path.install("core-alpha", LEAVES_A_TRACE + on_path.good)
    first = core.discover()
    assert core.discover() is first
    assert core.discover(disabled=[]) is first
    assert os.environ["TRACE"] == "core_alpha "


def test_the_order_is_that_of_the_names_and_not_of_the_folders(on_path: Site) -> None:
    for name in ("zeta", "alpha", "mid"):
        on_path.install(f"core-{name}", LEAVES_A_TRACE + on_path.good)
    names = [plugin.name for plugin in core.discover() if plugin.distribution]
    mine = [name for name in names if name in ("zeta", "alpha", "mid")]
    assert mine == ["alpha", "mid", "zeta"]
    assert names == sorted(names)
    assert os.environ["TRACE"].split() == ["core_alpha", "core_mid", "core_zeta"]


def test_disabled_plugins_are_not_imported(on_path: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("alpha", "beta", "gamma"):
        on_path.install(f"core-{name}", LEAVES_A_TRACE + on_path.good)
    monkeypatch.setenv("CORE_DISABLE", "beta , ")
    plugins = core.discover(disabled=["alpha"])
    assert os.environ["TRACE"] == "core_gamma "
    assert plugins["alpha"].state is plugins["beta"].state is State.DISABLED
    assert core.discover(everything_off=True)["gamma"].state is State.DISABLED
    assert os.environ["TRACE"] == "core_gamma "


def test_neither_conflicts_nor_other_interfaces_are_imported(on_path: Site) -> None:
    on_path.install("core-a", LEAVES_A_TRACE + on_path.good, plugin="same")
    on_path.install("core-b", LEAVES_A_TRACE + on_path.good, plugin="same")
    on_path.install("core-new", LEAVES_A_TRACE + on_path.good, group="core.v2")
    plugins = core.discover()
    assert plugins["same"].state is State.CONFLICT
    assert plugins["new"].state is State.INCOMPATIBLE
    assert os.environ["TRACE"] == ""


def test_one_distribution_seen_twice_on_the_path_is_no_conflict(
    on_path: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path.install("core-alpha", on_path.good)
    on_path.install("core-alpha", on_path.good, into="again")
    monkeypatch.syspath_prepend(str(on_path.folder / "again"))
    assert core.discover()["alpha"].state is State.ACTIVE


def test_a_plugin_is_described_by_its_distribution(on_path: Site) -> None:
    on_path.install("core-alpha", on_path.good, version="1.4.0")
    found = core.discover()["alpha"]
    described = (found.distribution, found.version, found.target, list(found.implementations))
    assert described == ("core-alpha", "1.4.0", "core_alpha:Plugin", ["core_probes"])


def test_strict_discovery_raises(on_path: Site) -> None:
    on_path.install("core-alpha", "raise ImportError('libfoo.so missing')")
    with pytest.raises(ImportError, match="libfoo"):
        core.discover(strict=True)
    assert core.discover(strict=False)["alpha"].state is State.BROKEN


@pytest.mark.parametrize("target", [":Missing", ":Plugin.more", ".none:Plugin"])
def test_an_entry_point_to_nothing_is_broken(on_path: Site, target: str) -> None:
    on_path.install("core-alpha", on_path.good, target=target)
    assert core.discover()["alpha"].state is State.BROKEN


def test_an_interrupt_is_no_plugins_failure(on_path: Site) -> None:
    on_path.install("core-alpha", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        core.discover()


def test_core_contributes_through_its_own_hooks() -> None:
    own = next(iter(core.discover(everything_off=True)))
    assert (own.name, own.state) == ("core", State.ACTIVE)
    engines = core.discover(everything_off=True).collect(Hooks.core_engines)
    assert [engine.plugin for engine in engines] == ["core"]
