"""Faults that show only in installed plugins: metadata, imports, commands and types."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Site

QUIET = """
class Plugin(Hooks):
    @hookimpl
    def core_probes(self):
        return ()
"""

HELPLESS = (
    QUIET
    + """
@hookimpl
def core_commands(self):
    import pydantic
    yield click.Command("greet", callback=print, help="Greets.")
Plugin.core_commands = core_commands
"""
)

RUDE = (
    """
import colorsys, os, threading
import pydantic
print("loaded")
os.environ["RUDE"] = "1"
colorsys.rgb_to_hls = print
threading.Thread(target=threading.Event().wait, daemon=True).start()
sum(range(20_000_000))
"""
    + QUIET
)


def outcomes(site: Site, name: str, *args: str) -> dict[str, tuple[str, str]]:
    """Status and remark of every check of a plugin."""
    ended = site.core("check", name, "--json", *args)
    assert ended.returncode in (0, 1), ended.stderr
    found = json.loads(ended.stdout)
    assert ended.returncode == int(any(row["status"] == "fail" for row in found))
    return {row["check"]: (row["status"], row["remark"]) for row in found}


def test_metadata_faults(site: Site) -> None:
    site.install("core-wrong", QUIET, plugin="right")
    found = outcomes(site, "right", "--only", "metadata")
    assert found["metadata.entry-point"][0] == "fail"
    assert "call it 'wrong'" in found["metadata.entry-point"][1]
    assert "does not require core" in found["metadata.core-requirement"][1]
    assert "make it a package" in found["metadata.py-typed"][1]
    assert "no licence is declared" in found["metadata.licence"][1]
    assert {status for status, _ in found.values()} == {"fail"}


def test_import_faults(site: Site) -> None:
    site.install("core-rude", RUDE)
    found = outcomes(site, "rude", "--only", "imports")
    for check, message in {
        "imports.no-torch": "loads pydantic",
        "imports.cheap": "times a bare interpreter, limit 3",
        "imports.quiet": "prints 'loaded'",
        "imports.no-threads": "starts 1 thread",
        "imports.same-environment": "changes RUDE",
    }.items():
        assert (found[check][0], message in found[check][1]) == ("fail", True), found[check]


def test_command_faults(site: Site) -> None:
    site.install("core-helpless", HELPLESS)
    found = outcomes(site, "helpless", "--only", "commands")
    assert found["commands.shows-help"][0] == "ok"
    assert "in the help of greet" in found["commands.has-example"][1]
    assert "--help loads pydantic" in found["commands.light"][1]


def test_patched_library_is_named(site: Site) -> None:
    site.install("core-rude", RUDE)
    # A small library in place of torch: what is compared is the same.
    ended = site.python(
        "-c",
        "from core.discovery import discover\n"
        "from core.testing.contract import Subject\n"
        "from core.testing.contract.imports import require_unpatched\n"
        "require_unpatched(Subject('rude', discover()), ('colorsys',))",
    )
    assert "importing core_rude:Plugin replaces colorsys.rgb_to_hls" in ended.stderr


@pytest.mark.slow
def test_type_faults(site: Site) -> None:
    pytest.importorskip("mypy")
    wrong = QUIET + "\ncount: int = 'three'\n"
    site.install("core-untyped", wrong)
    found = outcomes(site, "untyped", "--only", "static")
    for check in ("static.mypy", "static.pyright"):
        assert found[check][0] in ("fail", "skip"), found
        assert found[check][0] == "skip" or "core_untyped.py:" in found[check][1]
    assert found["static.mypy"][0] == "fail"
