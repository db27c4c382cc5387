"""``core run RECIPE`` and ``core plan``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from core.cli import plugins_of
from core.cli.options import as_json, make_run, plugins_for, run_options
from core.cli.table import echo_json, echo_table
from core.contributions import Recipe
from core.disk import disk_errors
from core.errors import CoreError, closest
from core.hooks import Hooks
from core.plugins import Plugins

_LEFT = (
    "settings.json",
    "plan.json",
    "metrics.jsonl",
    "loss.png",
    "summary.json",
    "model",
    "tokenizer",
)
"""What core's recipes leave in a run's folder, beside the checkpoints."""

if TYPE_CHECKING:
    from core.run import Run


def recipes(plugins: Plugins) -> dict[str, Recipe]:
    """All recipes by name.

    Raises:
        CoreError: when two plugins offer one name.
    """
    found: dict[str, Recipe] = {}
    owner: dict[str, str] = {}
    for contributed in plugins.collect_safely(Hooks.core_recipes):
        recipe = contributed.value
        if isinstance(recipe, Recipe):
            if recipe.name in found:
                both = f"{owner[recipe.name]} and {contributed.plugin}"
                raise CoreError(f"{both} both offer the recipe {recipe.name!r}", fix="disable one")
            found[recipe.name], owner[recipe.name] = recipe, contributed.plugin
    return found


class RecipeName(click.ParamType[str]):
    """Name of a recipe, completed by the shell."""

    name = "recipe"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names = recipes(plugins_of(ctx)).items()
        return [CompletionItem(n, help=r.summary) for n, r in names if n.startswith(incomplete)]


@click.command()
@click.argument("recipe", type=RecipeName(), required=False)
@run_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in the folder.")
@click.option("--overwrite", is_flag=True, help="Remove an earlier run from the folder first.")
@as_json
@click.pass_context
def run(
    ctx: click.Context,
    recipe: str | None,
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    out: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Run a recipe; without one, list them.

    Under torchrun, all ranks run it together.

    \b
    Example:
      core run quickstart
      core run train --set train.text=["notes/"] --out runs/notes
      torchrun --nproc-per-node 2 -m core run train --out runs/two-ranks
    """
    from core.settings import gather

    offered = recipes(plugins_for(ctx, gather(settings, assignments=assignments)))
    if recipe is None:
        rows = [(name, r.summary) for name, r in sorted(offered.items())]
        if as_json:
            echo_json([{"name": name, "summary": summary} for name, summary in rows])
        else:
            echo_table(("RECIPE", "WHAT"), rows)
        return
    if recipe not in offered:
        names = sorted(offered)
        known = f"known: {', '.join(names)}"
        raise CoreError(f"no recipe {recipe!r}{closest(recipe, names)}", fix=known)
    if resume and overwrite:
        raise click.UsageError("--resume goes on with a run, --overwrite removes it: choose one")
    folder = out or Path("runs") / recipe
    if resume and settings is None and (folder / "settings.json").is_file():
        settings = folder / "settings.json"
    with make_run(
        ctx,
        settings,
        assignments,
        enable,
        folder=folder,
        resume=resume,
        quiet=False,
        alone=False,
    ) as started:
        started.ranks.agree(lambda: _claim(started, overwrite))
        if not resume:
            started.write_description()
        started.tell(f"run in {folder}")
        # What a recipe prints is for people; scripts read the results.
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            results = offered[recipe].main(started)
        started.checkpoints.wait()
        started.write_description()
        if started.is_main:
            _show(results, as_json)


@click.command()
@run_options
@as_json
@click.pass_context
def plan(
    ctx: click.Context,
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show what a run with these settings would be made of, and change nothing.

    \b
    Example:
      core plan --enable hello --set hello.name=you
    """
    with make_run(ctx, settings, assignments, enable) as started:
        described = started.describe()
        tree = started.settings_tree()
        if as_json:
            echo_json({**described, "settings": tree})
            return
        rows = [
            (p["stage"], p["id"], p["phase"], ", ".join(p["claims"])) for p in described["plan"]
        ]
        if rows:
            echo_table(("STAGE", "TRANSFORM", "PHASE", "CLAIMS"), rows)
        else:
            click.echo("no transforms: no plugin is enabled")
        for section, content in tree.items():
            if isinstance(content, Mapping):
                click.echo(f"\n[{section}]")
                for key, value in content.items():
                    click.echo(f"{key} = {value!r}")


def _claim(run: Run, overwrite: bool) -> None:
    """Take the folder for this run alone, and refuse to mix two runs in it (rank 0)."""
    if not run.is_main:
        return
    run.checkpoints.own()
    if run.resume or not (run.folder / "plan.json").exists():
        return
    if not overwrite:
        raise CoreError(
            f"{run.folder} holds a run already",
            fix="pass --resume to go on, --overwrite to start anew, or another --out",
        )
    # Only what a run leaves: there may be files of the user in the folder.
    left = [run.folder / name for name in _LEFT]
    for path in [*left, *run.checkpoints.directory.glob("step-*")]:
        with disk_errors(f"cannot remove {path}"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _show(results: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        echo_json(dict(results))
        return
    rows = [(k, f"{v:.4f}" if isinstance(v, float) else str(v)) for k, v in results.items()]
    echo_table(("RESULT", "VALUE"), rows)
