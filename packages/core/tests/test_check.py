"""``core check``: a table, JSON, and exit codes that a script can rely on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Site


def test_table(site: Site) -> None:
    ended = site.core("check", "core", "--only", "metadata")
    assert ended.returncode == 0, ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert lines[0] == ["STATUS", "CHECK", "REMARK"]
    assert lines[1][:2] == ["skip", "metadata.entry-point"]
    assert ["ok", "metadata.licence"] in lines
    assert ended.stderr == ""


def test_json(site: Site) -> None:
    ended = site.core("check", "core", "--only", "metadata", "--json")
    first = json.loads(ended.stdout)[0]
    assert list(first) == ["check", "status", "remark", "demands", "seconds"]
    assert first["demands"] == "The entry point of a distribution core-NAME is called NAME."


def test_failure_exits_with_1(site: Site) -> None:
    site.install(
        "core-untidy", "class Plugin(Hooks):\n  @hookimpl\n  def core_probes(self): return ()"
    )
    ended = site.core("check", "untidy", "--only", "metadata")
    assert ended.returncode == 1
    assert "fail" in ended.stdout


def test_plugin_that_is_not_active_exits_with_2(site: Site) -> None:
    site.install("core-broken", "raise ImportError('libfoo.so missing')")
    ended = site.core("check", "broken")
    assert ended.returncode == 2
    assert "plugin 'broken' is broken: ImportError: libfoo.so missing" in ended.stderr
    ended = site.core("check", "broke")
    assert ended.returncode == 2
    assert "no plugin 'broke' is installed; did you mean 'broken'?" in ended.stderr


def test_list_and_unknown_area(site: Site) -> None:
    listed = site.core("check", "--list", "--only", "metadata")
    assert "metadata.licence" in listed.stdout
    assert "The distribution declares a licence." in listed.stdout
    wrong = site.core("check", "core", "--only", "metdata")
    assert wrong.returncode == 2
    assert "no area 'metdata'" in wrong.stderr
    assert site.core("check").returncode == 2
