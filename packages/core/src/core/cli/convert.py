"""``core convert``: from any readable checkpoint format to any writable one."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from core.cli.options import as_json, make_run, run_options
from core.cli.table import echo_json


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
    skip_objects: bool,
    dry_run: bool,
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Convert the checkpoint SOURCE into a new folder TARGET.

    Tensors stream through memory one at a time, and the target appears when it is complete.

    \b
    Example:
      core convert runs/quickstart/checkpoints/step-00000800 exported --to safetensors
    """
    from core.checkpoints.convert import execute, plan

    with make_run(ctx, settings, assignments, enable) as run:
        conversion, reader = plan(
            source, target, to, run, from_format=from_format, skip_objects=skip_objects
        )
        described = {
            "source": str(source),
            "from": conversion.source_format.name,
            "target": str(target),
            "to": conversion.target_format.name,
            "tensors": len(conversion.tensors),
            "bytes": conversion.total_bytes,
            "skipped": list(conversion.skipped),
            "done": not dry_run,
        }
        if not dry_run:
            # Standard output is for the result, which scripts read.
            with click.progressbar(
                length=max(1, conversion.total_bytes),
                label=f"{described['from']} -> {described['to']}",
                file=sys.stderr,
            ) as bar:
                execute(conversion, reader, run, lambda name, size: bar.update(size))
    if as_json:
        echo_json(described)
        return
    verb = "would write" if dry_run else "wrote"
    how = f"{described['from']} -> {described['to']}"
    click.echo(
        f"{verb} {target}: {described['tensors']} tensors, {described['bytes']:,} bytes, {how}"
    )
