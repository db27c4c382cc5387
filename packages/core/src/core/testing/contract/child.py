"""What a check looks at in a fresh interpreter; run by path, reports as JSON into a file.

Beside core it imports the standard library only, so that what is loaded afterwards is the plugin's
doing.
"""

from __future__ import annotations

import time

STARTED = time.process_time()
"""CPU seconds of the bare interpreter."""

import contextlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import threading  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Iterator, Mapping  # noqa: E402
from functools import partial  # noqa: E402
from importlib import import_module  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    import click

    from core.plugins import Plugins

HEAVY = ("torch", "transformers", "numpy", "pydantic")
"""Modules that the command line must not load before they are used."""

Report = dict[str, Any]


def load(target: str) -> object:
    """Import what an entry point names, and make the plugin object as discovery does."""
    module, _, attribute = target.partition(":")
    found: Any = import_module(module)
    for name in filter(None, attribute.split(".")):
        found = getattr(found, name)
    return found() if isinstance(found, type) else found


def report_import(target: str) -> Report:
    """Import a plugin and say what that cost and changed."""
    for name in ("core.contributions", "core.discovery", "click"):
        import_module(name)
    changed: set[str] = set()
    # Not by comparing: whoever asks may have imported the plugin, and handed its changes down.
    sys.addaudithook(partial(_note_environment, changed))
    threads = _threads()
    started = time.process_time()
    load(target)
    seconds = time.process_time() - started
    return {
        "interpreter": STARTED,
        "seconds": seconds,
        "heavy": [name for name in HEAVY if name in sys.modules],
        "threads": _threads() - threads,
        "environment": sorted(changed),
    }


def report_patches(target: str, *libraries: str) -> Report:
    """Import a plugin after ``libraries`` and name what is not what it was in them."""
    for name in libraries:
        import_module(name)
    tops = {name.partition(".")[0] for name in libraries}
    before = dict(_callables(tops))
    registered = _registered()
    load(target)
    after = dict(_callables(tops))
    patched = [name for name, found in before.items() if after.get(name) is not found]
    return {"patched": sorted(patched), "registered": sorted(_registered() - registered)}


def report_commands(target: str, name: str) -> Report:
    """Show the help of all commands of a plugin, and what that loaded."""
    from core.discovery import plugins_from

    plugins = plugins_from({} if name == "core" else {name: load(target)})
    shown = []
    for command in commands_of(name, plugins):
        shown += [{"name": path, **_help(path, each)} for path, each in _tree(command)]
    return {"commands": shown, "heavy": [h for h in HEAVY if h in sys.modules]}


def commands_of(name: str, plugins: Plugins) -> list[click.Command]:
    """Commands of a plugin; for core, those of the command line itself."""
    from core.hooks import Hooks

    if name != "core":
        return [c.value for c in plugins.collect_from([name], Hooks.core_commands)]
    import click

    from core.cli import cli

    context = click.Context(cli)
    context.params = {"no_plugins": True}
    names = cli.list_commands(context)
    return [c for c in (cli.get_command(context, n) for n in names) if c is not None]


def _tree(command: click.Command, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """Return the command and all commands below it."""
    path = f"{path} {command.name}".strip()
    yield path, command
    for inner in getattr(command, "commands", {}).values():
        yield from _tree(inner, path)


def _help(path: str, command: click.Command) -> Report:
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            command.main(["--help"], prog_name=f"core {path}", standalone_mode=True)
    except SystemExit as end:
        code = end.code or 0
    return {"exit": code, "text": text.getvalue()}


def _callables(tops: set[str]) -> Iterator[tuple[str, object]]:
    """All functions and classes of the loaded modules of some libraries, and their methods."""
    for module, found in list(sys.modules.items()):
        # A module that was forbidden stands there as None.
        if found and module.partition(".")[0] in tops:
            for name, value in list(vars(found).items()):
                if callable(value):
                    yield f"{module}.{name}", value
                if isinstance(value, type) and value.__module__ == module:
                    yield from _methods(f"{module}.{name}", value)


def _methods(prefix: str, kind: type) -> Iterator[tuple[str, object]]:
    for name, value in list(vars(kind).items()):
        if callable(value) or isinstance(value, property | classmethod | staticmethod):
            yield f"{prefix}.{name}", value


def _registered() -> set[str]:
    """Names in the global registries of transformers."""
    found: set[str] = set()
    tables: Mapping[str, str] = {
        "transformers.modeling_utils": "ALL_ATTENTION_FUNCTIONS",
        "transformers.masking_utils": "ALL_MASK_ATTENTION_FUNCTIONS",
    }
    for module, table in tables.items():
        if module in sys.modules:
            found |= {f"{table}[{key!r}]" for key in getattr(sys.modules[module], table)}
    return found


def _note_environment(changed: set[str], event: str, args: tuple[Any, ...]) -> None:
    if event in ("os.putenv", "os.unsetenv"):
        changed.add(os.fsdecode(args[0]))


def _threads() -> int:
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def main(kind: str, report: str, *args: str) -> None:
    """Make one report."""
    make: Any = {"import": report_import, "patches": report_patches, "commands": report_commands}
    try:
        content = make[kind](*args)
    except BaseException:
        content = {"error": traceback.format_exc(limit=-3)}
    Path(report).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
