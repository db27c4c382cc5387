"""``core fp6 inspect`` and ``compare``: what was written, and what it costs."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from core.cli.options import as_json
from core.cli.table import echo_json, echo_table

_SHOWN = 40
_folder = click.Path(path_type=Path)


@click.command()
@click.argument("path", type=_folder, metavar="DIR")
@click.option("--all", "everything", is_flag=True, help=f"Show more than {_SHOWN} weights.")
@as_json
def inspect(path: Path, everything: bool, as_json: bool) -> None:
    """Show what a folder with six-bit weights holds, and whether it can be right.

    Headers, shapes and scales are read and held against the configuration; codes are not read. The
    exit status is 0 when nothing is wrong, 1 when something is, and 2 when it cannot be opened.

    \b
    Example:
      core fp6 inspect models/mine-fp6
      core fp6 inspect models/mine-fp6 --json
    """
    from core_fp6.inspecting import inspect_folder

    found = inspect_folder(path)
    if as_json:
        echo_json(found.json())
        sys.exit(bool(found.faults))
    scales = f"groups of {found.group_size}" if found.group_size else "rows"
    share = f"{found.quantized_parameters:,} of {found.parameters:,}"
    facts = [
        ("format", f"{found.format}, a scale for {scales}"),
        ("layout version", str(found.layout_version)),
        ("quantized", f"{share} parameters, {found.coverage:.1%}"),
        ("bits per weight", f"{found.bits_per_weight:.3f}"),
        ("bytes", f"{found.nbytes:,}"),
        ("skipped", ", ".join(found.skipped) or "-"),
    ]
    echo_table(("", found.path), facts)
    click.echo("")
    shown = found.weights if everything else found.weights[:_SHOWN]
    rows = [(str([*each.shape]), f"{each.nbytes:,}", each.name) for each in shown]
    echo_table(("SHAPE", "BYTES", "WEIGHT"), rows)
    if len(shown) < len(found.weights):
        click.echo(f"... and {len(found.weights) - len(shown):,} more; --all shows them")
    for fault in found.faults:
        click.echo(f"WRONG  {fault}")
    sys.exit(bool(found.faults))


@click.command()
@click.argument("model", type=_folder, metavar="DIR")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE",
    help="Text to compare on; Python's own library by default. Repeatable.",
)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    metavar="NAME",
    help="Such as e2m3-g128, e3m2-row-search, int4-g128-asym. Repeatable; a selection by default.",
)
@click.option(
    "--sequences",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Sequences of up to 512 tokens to compare on, and as many to calibrate with.",
)
@click.option("--plot", "picture", type=_folder, metavar="FILE", help="Draw it into an image.")
@as_json
def compare(
    model: Path,
    texts: tuple[str, ...],
    variants: tuple[str, ...],
    sequences: int,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Compare six-bit weights with other formats, on the model in the folder DIR.

    For each way to store the weights: size, error, divergence from the model as it is, perplexity.
    One half of the text calibrates, the other one is compared on. The model is loaded in float32.

    \b
    Example:
      core fp6 compare runs/quickstart/model
      core fp6 compare models/mine --text held-out.txt --variant e2m3-g128 --plot quality.png
    """
    from core_fp6.quality.comparing import plot
    from core_fp6.quality.comparing.folders import compare_folder

    found = compare_folder(model, texts or ("stdlib",), variants or None, sequences)
    if picture is not None:
        plot(found, picture)
    if as_json:
        echo_json(found.as_dict())
        return
    found.print()
    if picture is not None:
        click.echo(f"wrote {picture}")
