"""The repository as its own tests see it: pages with their blocks, and packages."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Page:
    """A Markdown page and its fenced blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        """The contents of the fenced blocks of one language, in order."""
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)

    def links(self) -> list[Path]:
        """Where the relative links lead."""
        targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", self.text)
        return [self.path.parent / target for target in targets]

    def commands(self) -> list[list[str]]:
        """The arguments of every ``core`` command line in the shell blocks."""
        found = []
        for line in "".join(self.blocks("sh")).splitlines():
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words and words[0] in ("core", "torchrun"):
                    found.append(words[words.index("core") + 1 :])
        return found

    def run(self, names: dict[str, Any], code: str) -> None:
        """Run one of the Python blocks in a namespace; tracebacks show the lines of the page."""
        first = self.text[: self.text.index(code)].count("\n")
        exec(compile("\n" * first + code, str(self.path), "exec"), names)


def pages() -> list[Path]:
    """Every Markdown page that a reader may open."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/README.md")])


def packages() -> list[Path]:
    """The folders of the packages."""
    return sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))


def project(package: Path) -> dict[str, Any]:
    """The ``[project]`` table of a package."""
    content = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(content["project"])
