"""``core ucp``: look at any checkpoint, make sure that it is sound, compare it with another."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.cli import plugins_of
from core.cli.options import as_json
from core.cli.progress import bytes_bar
from core.cli.table import as_text, echo_json, echo_table

if TYPE_CHECKING:
    from core_ucp.view.view import View

_SHOWN = 40
_path = click.Path(path_type=Path)
_kind = click.option(
    "--from", "kind", default="auto", metavar="KIND", help="Kind of checkpoint; found by looking."
)
_rules = click.option(
    "--rules",
    metavar="FILE",
    help="How parameters lie, where files do not say it; or the name of rules of a plugin.",
)


@click.group("ucp")
def ucp() -> None:
    """Look at checkpoints of any framework, verify and compare them.

    \b
    Example:
      core ucp inspect global_step100
      core ucp verify universal/
      core ucp diff global_step100 universal/
    """


@ucp.command()
@click.argument("path", type=_path)
@_kind
@_rules
@click.option("--all", "everything", is_flag=True, help=f"Show more than {_SHOWN} tensors.")
@as_json
def inspect(path: Path, kind: str, rules: str | None, everything: bool, as_json: bool) -> None:
    """Show what a checkpoint holds; no tensor is read and no pickle is run.

    \b
    Example:
      core ucp inspect global_step100
      core ucp inspect iter_0000100 --json
    """
    view = _open(path, kind, rules)
    facts = _facts(view)
    rows = [
        {
            "key": key,
            "dtype": str(atom.dtype).removeprefix("torch."),
            "shape": list(atom.shape),
            "pieces": len(atom.pieces),
            "copies": 0 if atom.replicas is None else len(atom.replicas),
        }
        for key, atom in view.atoms.items()
    ]
    holes = _holes(view)
    if as_json:
        echo_json({**facts, "holes": holes, "tensors": rows})
        return
    for name, value in facts.items():
        click.echo(f"{name}: {as_text(value)}")
    click.echo("")
    shown = rows if everything else rows[:_SHOWN]
    head = ("DTYPE", "SHAPE", "PIECES", "KEY")
    cells = [(r["dtype"], str(r["shape"]), str(r["pieces"]), str(r["key"])) for r in shown]
    echo_table(head, [tuple(map(str, row)) for row in cells])
    if len(rows) > len(shown):
        click.echo(f"... and {len(rows) - len(shown):,} more; --all shows them")
    for hole in holes:
        click.echo(f"HOLE: {hole}")


@ucp.command()
@click.argument("path", type=_path)
@_kind
@_rules
@as_json
def verify(path: Path, kind: str, rules: str | None, as_json: bool) -> None:
    """Read every byte and hold it against all that the checkpoint says of itself.

    The exit status is 0 when no damage was found, 1 when there is some, and 2 when the checkpoint
    cannot be opened. What has no digest and no second copy can be read, but not verified.

    \b
    Example:
      core ucp verify universal/
      core ucp verify global_step100 --json
    """
    from core_ucp.execution.checking import verify as check

    view = _open(path, kind, rules)
    with bytes_bar("verify", view.nbytes) as advance:
        findings = list(check(view, advance))
    bad = [found for found in findings if found.status == "bad"]
    counts = {"ok": 0, "unchecked": 0, "bad": 0, **Counter(found.status for found in findings)}
    if as_json:
        problems = [{"key": found.key, "problem": found.problem} for found in bad]
        echo_json({"path": str(path), "sound": not bad, "counts": counts, "problems": problems})
    else:
        for found in bad:
            click.echo(f"BAD  {found.key}: {found.problem}")
        click.echo(
            f"{counts['ok']} tensors are what was saved, {counts['unchecked']} could be read but"
            f" have nothing to be held against, {counts['bad']} are damaged"
        )
    sys.exit(1 if bad else 0)


@ucp.command()
@click.argument("left", type=_path)
@click.argument("right", type=_path)
@_kind
@_rules
@click.option("--right-from", default="auto", metavar="KIND", help="As --from, for RIGHT.")
@click.option("--right-rules", metavar="FILE", help="As --rules, for RIGHT.")
@as_json
def diff(
    left: Path,
    right: Path,
    kind: str,
    rules: str | None,
    right_from: str,
    right_rules: str | None,
    as_json: bool,
) -> None:
    """Compare two checkpoints bit by bit, whatever their formats and parallel layouts.

    The exit status is 0 when they hold the same, 1 when they differ, and 2 when one of them cannot
    be opened. ``--from`` and ``--rules`` are those of LEFT.

    \b
    Example:
      core ucp diff global_step100 universal/
    """
    from core_ucp.execution.checking import diff as compare

    first, second = _open(left, kind, rules), _open(right, right_from, right_rules)
    with bytes_bar("diff", first.nbytes) as advance:
        found = list(compare(first, second, advance))
    if as_json:
        rows = [{"key": each.key, "problem": each.problem} for each in found]
        echo_json({"same": not found, "tensors": len(first.atoms), "differences": rows})
    else:
        for each in found:
            click.echo(f"{each.key}: {each.problem}")
        counted = f"{len(found):,} difference{'' if len(found) == 1 else 's'}"
        verdict = counted if found else "the same, bit for bit"
        click.echo(f"{len(first.atoms)} and {len(second.atoms)} tensors: {verdict}")
    sys.exit(1 if found else 0)


def _open(path: Path, kind: str, rules: str | None) -> View:
    from core_ucp.conversion import rules_named
    from core_ucp.sources.registry import open_checkpoint

    named = rules_named(rules, plugins_of(click.get_current_context())) if rules else None
    return open_checkpoint(path, kind, named)


def _facts(view: View) -> dict[str, Any]:
    weights = [atom for key, atom in view.atoms.items() if key.startswith("model.")]
    resume = view.resume
    return {
        "path": str(view.path),
        "framework": view.framework,
        "mesh": dict(view.mesh),
        **view.details,
        "files": len(view.files),
        "bytes": view.nbytes,
        "weights": len(weights),
        "parameters": sum(atom.numel for atom in weights),
        "step": resume.step,
        "optimizer": resume.optimizer,
        "tied": dict(view.aliases),
        "remarks": list(view.remarks),
    }


def _holes(view: View) -> list[str]:
    from core_ucp.view.boxes import untiled

    problems = ((key, untiled(atom.shape, atom.pieces.boxes)) for key, atom in view.atoms.items())
    return [f"{key}: {problem}" for key, problem in problems if problem]
