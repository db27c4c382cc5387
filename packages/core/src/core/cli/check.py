"""``core check``: hold an installed plugin against the contract."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import click
from click.shell_completion import CompletionItem

from core.cli import plugins_of
from core.cli.options import as_json
from core.cli.table import echo_json, echo_table


def _active(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    names = [plugin.name for plugin in plugins_of(ctx).active]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.command()
@click.argument("name", metavar="PLUGIN", required=False, shell_complete=_active)
@click.option("--only", metavar="AREA", multiple=True, help="Run this area only. Repeatable.")
@click.option("--list", "listing", is_flag=True, help="List the checks and run none.")
@as_json
@click.pass_context
def check(
    ctx: click.Context, name: str | None, only: tuple[str, ...], listing: bool, as_json: bool
) -> None:
    """Hold an installed plugin against the contract; exit with 1 when it breaks a point.

    \b
    Example:
      core check hello
      core check hello --only metadata --only imports --json
      core check --list
    """
    from core.testing import contract

    if listing:
        chosen = contract.checks(only)
        echo_table(("CHECK", "DEMANDS"), [(each.name, each.summary) for each in chosen])
        return
    if name is None:
        raise click.UsageError("name a plugin, such as: core check core")
    subject = contract.Subject(name, plugins_of(ctx))
    chosen = contract.checks(only)
    with redirect_stdout(sys.stderr):
        running = contract.run_checks(subject, chosen)
        hidden = not sys.stderr.isatty()
        with click.progressbar(
            running, length=len(chosen), label=name, file=sys.stderr, hidden=hidden
        ) as bar:
            outcomes = list(bar)
    if as_json:
        echo_json([outcome.as_json() for outcome in outcomes])
    else:
        rows = [(o.status, o.check.name, o.text) for o in outcomes]
        echo_table(("STATUS", "CHECK", "REMARK"), rows)
    sys.exit(int(any(outcome.status == "fail" for outcome in outcomes)))
