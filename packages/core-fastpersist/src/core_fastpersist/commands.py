"""``core fastpersist``: look at what was saved, and make sure that it is sound."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.cli.options import as_json
from core.cli.progress import bytes_bar
from core.cli.table import echo_json, echo_table

if TYPE_CHECKING:
    from core_fastpersist.verification import Finding

_SHOWN = 40

existing = click.argument("path", type=click.Path(path_type=Path), metavar="FILE|DIR")


@click.group("fastpersist")
def fastpersist() -> None:
    """Look at checkpoints, and make sure that they are sound.

    \b
    Example:
      core fastpersist verify runs/mine/checkpoints
      core fastpersist inspect model.safetensors --tree
    """


@fastpersist.command()
@existing
@as_json
def verify(path: Path, as_json: bool) -> None:
    """Read every byte and hold it against its digest.

    PATH is a file, a checkpoint, or a folder of checkpoints. The exit status is 0 when no damage
    was found, 1 when there is some, and 2 when there is nothing to verify.

    \b
    Example:
      core fastpersist verify runs/mine/checkpoints/step-00000100
      core fastpersist verify model.safetensors --json
    """
    from core_fastpersist.verification import verify as check

    with bytes_bar("verify") as progress:
        findings = check(path, progress)
    damages = sum(found.status == "fail" for found in findings)
    uncovered = sum(found.status == "warn" for found in findings)
    if as_json:
        echo_json(
            {
                "path": str(path),
                "sound": not damages,
                "damages": damages,
                "not_covered": uncovered,
                "findings": [found.as_json() for found in findings],
            }
        )
    else:
        base = path if path.is_dir() else path.parent
        rows = [_row(found, base) for found in findings]
        echo_table(("STATUS", "FILE", "CHUNK", "BYTES", "FOUND"), rows)
        click.echo(_verdict(findings, damages, uncovered))
    sys.exit(int(damages > 0))


@fastpersist.command()
@existing
@click.option("--tree", is_flag=True, help="Show the Python structure that was saved.")
@click.option("--all", "everything", is_flag=True, help=f"Show more than {_SHOWN} rows of a table.")
@as_json
def inspect(path: Path, tree: bool, everything: bool, as_json: bool) -> None:
    """Show what a file or a checkpoint holds, and load none of it.

    Headers and metadata are read, tensors are not, and nothing is unpickled.

    \b
    Example:
      core fastpersist inspect model.safetensors --tree
      core fastpersist inspect runs/mine/checkpoints/step-00000100 --json
    """
    from core_fastpersist.inspection import inspect as look

    found = look(path)
    if as_json:
        echo_json(found)
        return
    limit = None if everything else _SHOWN
    structure = found.pop("tree", None)
    for title, content in found.items():
        _show(title, content, limit)
    if tree:
        _show_tree(structure, found.get("tensors", []), limit)


def _row(found: Finding, base: Path) -> tuple[str, ...]:
    file = found.file.relative_to(base) if found.file.is_relative_to(base) else found.file
    range_ = "" if found.begin is None else f"{found.begin:,}-{found.end or 0:,}"
    text = found.what
    if found.expected:
        text += f"; expected {found.expected}, found {found.actual or 'nothing to compare'}"
    return found.status, str(file), "" if found.chunk is None else str(found.chunk), range_, text


def _verdict(findings: Sequence[Finding], damages: int, uncovered: int) -> str:
    sound = sum(found.status == "ok" for found in findings)
    return f"damages: {damages}; sound files: {sound}; not covered by digests: {uncovered}"


def _show(title: str, content: Any, limit: int | None) -> None:
    """A table for rows, and for a mapping one of two columns."""
    if isinstance(content, Mapping) and content:
        click.echo(f"\n{title}")
        echo_table(("KEY", "VALUE"), [(str(k), _short(v)) for k, v in content.items()])
    elif isinstance(content, list) and content:
        shown = content[:limit]
        click.echo(f"\n{title} ({len(content):,})")
        head = [str(key).upper() for key in shown[0]]
        echo_table(head, [[_short(row[key]) for key in shown[0]] for row in shown])
        _cut(len(content), limit)
    elif not isinstance(content, Mapping | list):
        click.echo(f"{title}: {_short(content)}")


def _show_tree(structure: Any, tensors: Sequence[Mapping[str, Any]], limit: int | None) -> None:
    from core_fastpersist.outline import outline

    if structure is None:
        click.echo("\ntree: none; another program wrote this")
        return
    lines = outline(structure, tensors)
    click.echo(f"\ntree\n{chr(10).join(lines[:limit])}")
    _cut(len(lines), limit)


def _cut(count: int, limit: int | None) -> None:
    if limit is not None and count > limit:
        click.echo(f"… {count - limit:,} more; --all shows them")


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return text if len(text) <= 200 else f"{text[:197]}…"
