"""``core convert``: from any readable checkpoint format to any writable one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from core.cli.options import as_json, make_run, run_options
from core.cli.progress import bytes_bar
from core.cli.table import as_text, echo_json


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", required=True, metavar="FORMAT", help="Format to write, such as safetensors.")
@click.option(
    "--from",
    "from_format",
    default="auto",
    metavar="FORMAT",
    help="Format of SOURCE, where looking does not tell.",
)
@click.option(
    "--rules",
    metavar="FILE",
    help="How parameters are laid out in SOURCE; short for --set checkpoint.rules=FILE.",
)
@click.option("--skip-objects", is_flag=True, help="Leave out entries that are no tensors.")
@click.option("--dry-run", is_flag=True, help="Check and print what would be done.")
@run_options
@as_json
@click.pass_context
def convert(
    ctx: click.Context,
    source: Path,
    target: Path,
    to: str,
    from_format: str,
    rules: str | None,
    skip_objects: bool,
    dry_run: bool,
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Convert the checkpoint SOURCE into a new folder TARGET.

    Memory stays small whatever the size, and the target appears when it is complete.

    \b
    Example:
      core convert runs/quickstart/checkpoints/step-00000800 exported --to safetensors
    """
    from core.checkpoints.convert import execute, plan

    if rules is not None:
        assignments = (*assignments, f"checkpoint.rules={rules}")
    with make_run(ctx, settings, assignments, enable) as run:
        conversion = plan(
            source, target, to, run, from_format=from_format, skip_objects=skip_objects
        )
        work = conversion.work
        facts = work.describe() if dry_run else {}
        described: dict[str, Any] = {
            "source": str(source),
            "from": conversion.source_format.name,
            "target": str(target),
            "to": conversion.target_format.name,
            "tensors": work.tensors,
            "bytes": work.nbytes,
            "skipped": list(work.skipped),
            "remarks": list(work.remarks),
            **facts,
            "done": not dry_run,
        }
        if not dry_run:
            with bytes_bar(f"{described['from']} -> {described['to']}", work.nbytes) as advance:
                execute(conversion, lambda name, size: advance(size))
    if as_json:
        echo_json(described)
        return
    verb = "would write" if dry_run else "wrote"
    how = f"{described['from']} -> {described['to']}"
    click.echo(
        f"{verb} {target}: {described['tensors']} tensors, {described['bytes']:,} bytes, {how}"
    )
    for name, value in facts.items():
        click.echo(f"  {name}: {as_text(value)}")
    for remark in work.remarks:
        click.echo(f"  note: {remark}")
