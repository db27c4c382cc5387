"""``core doctor`` and ``core bench``: fast and slow probes, one table, one JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from core.cli.options import as_json, make_run, run_options
from core.cli.table import echo_json, echo_table

if TYPE_CHECKING:
    from core.probes import Finding


@click.command()
@click.argument("names", nargs=-1, metavar="[PROBE]...")
@run_options
@as_json
@click.pass_context
def doctor(
    ctx: click.Context,
    names: tuple[str, ...],
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check this installation and this machine; exit with 1 when a check fails.

    \b
    Example:
      core doctor
      core doctor core.machine --json
    """
    from core.probes import measure, select

    ctx.find_root().command.list_commands(ctx)  # type: ignore[attr-defined]
    with make_run(ctx, settings, assignments, enable) as run:
        findings = list(measure(run, select(run, names, slow=False)))
    _show(findings, as_json)
    sys.exit(int(any(found.reading.status == "fail" for found in findings)))


@click.command()
@click.argument("names", nargs=-1, metavar="[PROBE]...")
@run_options
@as_json
@click.pass_context
def bench(
    ctx: click.Context,
    names: tuple[str, ...],
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Measure plugins against named peers; figures are ratios of one run.

    \b
    Example:
      core bench
      core bench core.checkpoint --json > checkpoint.json
    """
    from core.probes import measure, select

    findings: list[Finding] = []
    with make_run(ctx, settings, assignments, enable) as run:
        for found in select(run, names, slow=True):
            run.tell(f"{found.id}: {found.value.summary}")
            findings += measure(run, [found])
    _show(findings, as_json)
    sys.exit(int(any(found.reading.status == "fail" for found in findings)))


def _show(findings: Iterable[Finding], as_json: bool) -> None:
    if as_json:
        echo_json([found.as_json() for found in findings])
        return
    rows = []
    for found in findings:
        reading = found.reading
        number = isinstance(reading.value, float)
        value = f"{reading.value:.3g}" if number else str(reading.value)
        figure = f"{value} {reading.unit}".strip()
        remark = "; ".join(part for part in (reading.limit, reading.advice) if part)
        rows.append((reading.status, found.plugin, reading.name, figure, remark))
    echo_table(("STATUS", "PLUGIN", "CHECK", "FOUND", "REMARK"), rows)
