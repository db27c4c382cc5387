"""``core fp6 quantize`` and ``dequantize``: folders in, folders out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from core.cli.options import as_json, make_run, run_options
from core.cli.progress import bytes_bar
from core.cli.table import echo_json

if TYPE_CHECKING:
    from core_fp6.streaming.dequantizing import Dtype

_folder = click.Path(path_type=Path)


@click.command()
@click.argument("source", type=_folder)
@click.argument("target", type=_folder)
@click.option("--format", "format_", type=click.Choice(["e2m3", "e3m2"]), help="Of the codes.")
@click.option(
    "--group-size",
    type=click.Choice(["0", "32", "64", "128", "256"]),
    help="Columns that share a scale; 0 for one scale per row.",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="PATTERN",
    help="Leave modules as they are: a name, its end, or a regular expression. Repeatable.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FILE",
    help="Search scales by what this text does to the model, which is loaded for it. Repeatable.",
)
@run_options
@as_json
@click.pass_context
def quantize(
    ctx: click.Context,
    source: Path,
    target: Path,
    format_: str | None,
    group_size: str | None,
    skip: tuple[str, ...],
    texts: tuple[str, ...],
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Quantize the model in the folder SOURCE into a new folder TARGET.

    Tensors go through one by one, so memory stays small whatever the size of the model; with --text
    the model is loaded. What is not said here is as the settings of fp6 say. The result loads with
    from_pretrained wherever core-fp6 is installed.

    \b
    Example:
      core fp6 quantize models/mine models/mine-fp6
      core fp6 quantize models/mine models/mine-fp6 --format e3m2 --group-size 0 --skip o_proj
    """
    from core_fp6.settings import FP6Settings
    from core_fp6.streaming.calibrating import quantize_calibrated
    from core_fp6.streaming.quantizing import quantize_folder

    with make_run(ctx, settings, assignments, enable) as run:
        given = run.settings(FP6Settings)
        wanted: dict[str, Any] = {
            "format": format_ or given.format,
            "group_size": given.group_size if group_size is None else int(group_size),
            "skip": skip or given.skip,
        }
        if texts:
            report = quantize_calibrated(source, target, texts, **wanted)
        else:
            with bytes_bar("quantize") as advance:
                report = quantize_folder(source, target, **wanted, progress=advance)
    if as_json:
        echo_json({"source": str(source), "target": str(target), **report.json()})
        return
    report.print()
    click.echo(f"wrote {target}")


@click.command()
@click.argument("source", type=_folder)
@click.argument("target", type=_folder)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of all floating-point weights; else as config.json says.",
)
@as_json
def dequantize(source: Path, target: Path, dtype: Dtype | None, as_json: bool) -> None:
    """Write the quantized model in SOURCE as a plain one into a new folder TARGET.

    The weights become the values that their codes stand for; what was rounded away stays away.

    \b
    Example:
      core fp6 dequantize models/mine-fp6 models/mine-again --dtype bfloat16
    """
    from core_fp6.streaming.dequantizing import dequantize_folder

    with bytes_bar("dequantize") as advance:
        written = dequantize_folder(source, target, dtype, progress=advance)
    if as_json:
        echo_json({"source": str(source), "target": str(target), "bytes": written})
        return
    click.echo(f"wrote {target}: {written:,} bytes")
