"""``core plugins`` and ``core hooks``: what is installed, and what can be hooked into."""

from __future__ import annotations

import inspect

import click

from core.cli import plugins_of
from core.cli.options import as_json
from core.cli.table import echo_json, echo_table
from core.hooks import API, Hooks


@click.command()
@as_json
@click.pass_context
def plugins(ctx: click.Context, as_json: bool) -> None:
    """List installed plugins, their states, and the reason for each state.

    \b
    Example:
      core plugins --json
    """
    from core.catalogue import packages

    ctx.find_root().command.list_commands(ctx)  # type: ignore[attr-defined]
    found = plugins_of(ctx)
    rows = [
        {
            "name": plugin.name,
            "state": str(plugin.state),
            "distribution": plugin.distribution,
            "version": plugin.version,
            "reason": plugin.reason,
        }
        for plugin in found
    ]
    missing = [package for package in packages() if package.plugin not in found]
    rows += [
        {
            "name": p.plugin,
            "state": "not installed",
            "distribution": p.name,
            "version": "",
            "reason": p.summary,
        }
        for p in missing
    ]
    if as_json:
        echo_json({"api": API, "plugins": rows})
        return
    echo_table(
        ("NAME", "STATE", "DISTRIBUTION", "VERSION", "REASON"), [list(row.values()) for row in rows]
    )


@click.command()
@as_json
@click.pass_context
def hooks(ctx: click.Context, as_json: bool) -> None:
    """List the hooks, and which plugins implement each.

    \b
    Example:
      core hooks
    """
    active = plugins_of(ctx).active
    rows = [
        {
            "hook": name,
            "summary": (inspect.getdoc(method) or "").splitlines()[0],
            "plugins": [plugin.name for plugin in active if name in plugin.implementations],
        }
        for name, method in vars(Hooks).items()
        if name.startswith("core_")
    ]
    if as_json:
        echo_json({"api": API, "hooks": rows})
        return
    table = [
        (str(row["hook"]), ", ".join(row["plugins"]) or "-", str(row["summary"])) for row in rows
    ]
    echo_table(("HOOK", "IMPLEMENTED BY", "WHAT"), table)
