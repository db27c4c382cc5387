"""Asking a fresh interpreter: see :mod:`core.testing.contract.child`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.testing.contract import child
from core.testing.contract.check import Skip
from core.testing.contract.subject import Subject

_LIMIT = 300.0


@dataclass(frozen=True)
class Answer:
    """What the interpreter reported, and what it printed."""

    report: dict[str, Any]
    printed: str


def ask(subject: Subject, kind: str, *args: str) -> Answer:
    """Look at the plugin in a fresh interpreter.

    Raises:
        AssertionError: when the plugin fails there, or takes more than five minutes.
        Skip: for a plugin that is not in a module.
    """
    target = subject.plugin.target
    if not target or "<locals>" in target or target.startswith("__main__"):
        raise Skip("the plugin is no attribute of a module")
    report = subject.folder() / "report.json"
    # -P: the folder of the script must not hide anybody's modules.
    command = [sys.executable, "-P", child.__file__, kind, str(report), target, *args]
    try:
        ended = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_LIMIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AssertionError(f"importing {target} takes more than {_LIMIT:.0f} s") from None
    return Answer(_read(report, target, ended.stdout), ended.stdout)


def _read(report: Path, target: str, printed: str) -> dict[str, Any]:
    if not report.exists():
        raise AssertionError(f"the interpreter died importing {target}: {printed.strip()[-300:]}")
    content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    if "error" in content:
        raise AssertionError(f"{target} fails in a fresh interpreter: {content['error'].strip()}")
    return content
