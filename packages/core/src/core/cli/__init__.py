"""The ``core`` command line: built-in commands in small modules, plugin commands beside them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from core import __version__
from core.discovery import discover
from core.errors import CoreError, closest
from core.hooks import Hooks
from core.plugins import Plugins, State

_BUILTIN = {
    "bench": "core.cli.probes",
    "check": "core.cli.check",
    "completion": "core.cli.completion",
    "convert": "core.cli.convert",
    "doctor": "core.cli.probes",
    "generate": "core.cli.generate",
    "hooks": "core.cli.plugins",
    "new": "core.cli.new",
    "plan": "core.cli.run",
    "plugins": "core.cli.plugins",
    "run": "core.cli.run",
}
_COLLECTED = "core.cli.commands"


class Commands(click.Group):
    """Built-in commands, imported when they are used, and the commands of active plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*_BUILTIN, *self._of_plugins(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _BUILTIN:
            command: click.Command = getattr(import_module(_BUILTIN[cmd_name]), cmd_name)
            return command
        return self._of_plugins(ctx).get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and self.get_command(ctx, name) is None:
            plugins = plugins_of(ctx)
            if name in plugins and plugins[name].state is not State.ACTIVE:
                raise CoreError(plugins.explain(name), fix="see `core plugins`")
            suggestion = closest(name, self.list_commands(ctx))
            ctx.fail(f"no command {name!r}{suggestion}")
        return super().resolve_command(ctx, args)

    def _of_plugins(self, ctx: click.Context) -> dict[str, click.Command]:
        """Commands of plugins; one that collides or is no command makes its plugin ``broken``."""
        if _COLLECTED in ctx.meta:
            known: dict[str, click.Command] = ctx.meta[_COLLECTED]
            return known
        plugins = plugins_of(ctx)
        found: dict[str, click.Command] = ctx.meta.setdefault(_COLLECTED, {})
        owner: dict[str, str] = {}
        for contributed in plugins.collect_safely(Hooks.core_commands):
            command: Any = contributed.value
            if not isinstance(command, click.Command) or not command.name:
                plugins.mark_broken(contributed.plugin, "core_commands yielded no click command")
            elif command.name in _BUILTIN or command.name in found:
                other = owner.get(command.name, "core")
                reason = f"its command {command.name!r} is {other}'s already"
                plugins.mark_broken(contributed.plugin, reason)
            else:
                found[command.name] = command
                owner[command.name] = contributed.plugin
        return found


def plugins_of(ctx: click.Context) -> Plugins:
    """The plugins as the options of the command line left them."""
    options = ctx.find_root().params
    return discover(
        disabled=options.get("no_plugin") or (),
        everything_off=bool(options.get("no_plugins")),
    )


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="core")
@click.option(
    "--no-plugin",
    metavar="NAME",
    multiple=True,
    is_eager=True,  # or --help would list the commands of plugins that are left out
    help="Leave a plugin out. Repeatable.",
)
@click.option("--no-plugins", is_flag=True, is_eager=True, help="Leave all plugins out.")
@click.option("-v", "--verbose", is_flag=True, help="Say more about what is chosen and why.")
def cli(no_plugin: Sequence[str], no_plugins: bool, verbose: bool) -> None:
    """Train and serve PyTorch models with plugins.

    \b
    Example:
      core run quickstart
      core plugins
    """
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; a :class:`CoreError` prints without a traceback and exits with 2."""
    try:
        cli.main(args=None if args is None else list(args), prog_name="core")
    except CoreError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        click.echo(f"error: {error}{notes}", err=True)
        sys.exit(2)
