"""Static types of the plugin's module, as both checkers see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from core.testing.contract.check import Skip, checks_of, require
from core.testing.contract.subject import Subject

_LIMIT = 300.0


def mypy(subject: Subject) -> None:
    """The module of the plugin passes mypy --strict."""
    ended = _checker(
        "mypy",
        "--config-file=",
        "--strict",
        "--follow-imports=silent",
        "--no-error-summary",
        "--no-color-output",
        "--hide-error-context",
        "--cache-dir",
        _cache(),
        str(subject.module),
    )
    if ended.returncode > 1:
        raise Skip(f"mypy cannot run here: {_first(ended.stdout + ended.stderr)}")
    require(ended.returncode == 0, f"mypy --strict: {_shorten(ended.stdout)}")


def pyright(subject: Subject) -> None:
    """The module of the plugin passes pyright."""
    project = subject.folder() / "pyrightconfig.json"
    # Without an exclude of its own it leaves out hidden folders, and most environments are in one;
    # and it finds nothing by an absolute path.
    config = {"include": [os.path.relpath(subject.module, project.parent)], "exclude": []}
    project.write_text(json.dumps(config), encoding="utf-8")
    options = ("--outputjson", "--pythonpath", sys.executable, "--project", str(project))
    ended = _checker("pyright", *options)
    try:
        report = json.loads(ended.stdout[ended.stdout.index("{") :])
        found = report["generalDiagnostics"]
        require(report["summary"]["filesAnalyzed"], f"pyright does not see {subject.module}")
    except (ValueError, KeyError):
        why = _first(ended.stderr or ended.stdout)
        raise Skip(f"pyright cannot run here: {why}") from None
    errors = [
        f"{Path(d['file']).name}:{d['range']['start']['line'] + 1}: {d['message']}"
        for d in found
        if d["severity"] == "error"
    ]
    text = _shorten("\n".join(errors))
    require(not errors, f"pyright: {text}")


def _checker(module: str, *args: str) -> subprocess.CompletedProcess[str]:
    if find_spec(module) is None:
        raise Skip(f"{module} is not installed")
    command = [sys.executable, "-m", module, *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise Skip(f"{module} takes more than {_LIMIT:.0f} s") from None


def _cache() -> str:
    """Where mypy keeps what it knows of torch; without it every check would take a minute."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return os.environ.get("MYPY_CACHE_DIR") or str(Path(home) / "core" / "mypy")


def _shorten(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


def _first(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no output")


CHECKS = checks_of("static", mypy, pyright)
