"""Options that several commands share, and the run that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from core.discovery import discover

if TYPE_CHECKING:
    from core.plugins import Plugins
    from core.run import Run
    from core.settings import Values

F = TypeVar("F", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def run_options(command: F) -> F:
    """Add ``--settings``, ``--set`` and ``--enable``."""
    options = [
        click.option(
            "--settings",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="TOML settings file, or the settings.json of an earlier run.",
        ),
        click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="SECTION.KEY=VALUE",
            help="Set one value, over file and environment. Repeatable.",
        ),
        click.option(
            "--enable",
            multiple=True,
            metavar="PLUGIN",
            help="Let a plugin change the model. Repeatable; adds to the file's list.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def make_run(
    ctx: click.Context,
    settings: Path | None = None,
    assignments: Sequence[str] = (),
    enable: Sequence[str] = (),
    *,
    folder: Path = Path("runs/run"),
    resume: bool = False,
    quiet: bool = True,
    alone: bool = True,
) -> Run:
    """Start a run from the options of a command; ``alone`` looks at no other rank."""
    from core.distributed import Ranks
    from core.run import start
    from core.settings import gather, names

    values = gather(settings, assignments=assignments)
    return start(
        settings,
        set=assignments,
        enable=[*names(values, "enable"), *enable] if enable else None,
        folder=folder,
        resume=resume,
        quiet=quiet,
        plugins=plugins_for(ctx, values),
        ranks=Ranks() if alone else None,
    )


def plugins_for(ctx: click.Context, values: Values) -> Plugins:
    """The plugins as the options of the command line and the list in the settings left them."""
    from core.settings import names

    root = ctx.find_root().params
    return discover(
        disabled=[*names(values, "disable"), *root["no_plugin"]],
        everything_off=root["no_plugins"],
    )
