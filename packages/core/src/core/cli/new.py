"""``core new``: write the package of a new plugin."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from keyword import iskeyword
from pathlib import Path, PurePosixPath
from string import Template

import click

from core import __version__
from core.discovery import RESERVED
from core.disk import disk_errors
from core.errors import CoreError
from core.hooks import GROUP

_NAME = re.compile(r"core-[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SUFFIX = ".template"
_PACKAGE = "__package__"


@click.command()
@click.argument("name", metavar="NAME")
@click.option(
    "--path",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    help="Folder to put the package's folder into; here by default.",
)
def new(name: str, path: Path) -> None:
    """Write a working plugin package called NAME: settings, a transform, a command and a probe.

    \b
    Example:
      core new core-hello
      core new core-hello --path packages
    """
    folder = write_package(name, path)
    plugin = name.removeprefix("core-")
    click.echo(f"wrote {folder}\n")
    click.echo("Next:")
    for line in (
        f"cd {folder}",
        "pip install -e . pytest hypothesis",
        "core plugins",
        f"core check {plugin}",
        f"core plan --enable {plugin}",
    ):
        click.echo(f"  {line}")


def write_package(name: str, parent: Path) -> Path:
    """Write the package into ``parent``; its folder appears when it is complete.

    Raises:
        CoreError: for a name that cannot be used, or a folder that exists or cannot be written.
    """
    words = words_for(name)
    folder = parent / name
    if folder.exists() or folder.is_symlink():
        raise CoreError(f"{folder} exists already", fix="choose another name or --path")
    temporary = parent / f".{name}-{uuid.uuid4().hex[:8]}"
    try:
        with disk_errors(f"cannot write {folder}"):
            for file, text in _rendered(words):
                target = temporary / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def words_for(name: str) -> dict[str, str]:
    """Return the words of the template for a package called ``name``.

    Raises:
        CoreError: for a name that a plugin package cannot have.

    Example:
        >>> words_for("core-my-thing")["settings"]
        'MyThingSettings'
    """
    plugin = name.removeprefix("core-")
    if not _NAME.fullmatch(name):
        tidy = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("core-")
        better = f"core-{tidy}" if _NAME.fullmatch(f"core-{tidy}") else "core-hello"
        why = "it must be 'core-' and lower-case words of a-z and 0-9 with dashes"
        raise CoreError(f"a plugin cannot be called {name!r}", why=why, fix=f"such as {better!r}")
    if iskeyword(plugin.replace("-", "_")):
        why = "it is a word of Python"
        raise CoreError(f"a plugin cannot be called {name!r}", why=why, fix="choose another name")
    if plugin in RESERVED:
        why = f"{plugin!r} is a name of core's own"
        raise CoreError(f"a plugin cannot be called {name!r}", why=why, fix="choose another name")
    major, minor, *_ = __version__.split(".")
    return {
        "distribution": name,
        "plugin": plugin,
        "package": name.replace("-", "_"),
        "keyword": plugin.replace("-", "_"),
        "settings": "".join(word.capitalize() for word in plugin.split("-")) + "Settings",
        "group": GROUP,
        "requirement": f">={major}.{minor},<{int(major) + 1}",
    }


def _rendered(words: dict[str, str]) -> Iterator[tuple[Path, str]]:
    for file, source in _files(files("core").joinpath("template"), PurePosixPath()):
        name = str(file).removesuffix(_SUFFIX).replace(_PACKAGE, words["package"])
        yield Path(name), Template(source.read_text(encoding="utf-8")).substitute(words)


def _files(
    folder: Traversable, inside: PurePosixPath
) -> Iterator[tuple[PurePosixPath, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(entry, inside / entry.name)
        elif entry.name.endswith(_SUFFIX):
            yield inside / entry.name, entry
