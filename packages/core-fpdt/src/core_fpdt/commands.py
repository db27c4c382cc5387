"""``core fpdt``: what long sequences will take, and whether a model can be run in chunks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from core.cli.options import as_json, make_run, run_options
from core.cli.table import echo_json, echo_table

if TYPE_CHECKING:
    from torch import nn

    from core.run import Run

_path = click.Path(path_type=Path)


@click.group("fpdt")
def fpdt() -> None:
    """Plan training on long sequences, and see whether a model can be run in chunks.

    \b
    Example:
      core fpdt plan --model llama-3-8b --sequence 2M --gpus 4 --hbm 80GiB --host 1TiB
      core fpdt probe models/mine
    """


@fpdt.command()
@click.option(
    "--model", required=True, metavar="NAME|DIR", help="Such as llama-3-8b, or a model's folder."
)
@click.option(
    "--sequence", required=True, metavar="TOKENS", help="Such as 128K or 2M (2 * 1024^2)."
)
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="In all.")
@click.option(
    "--ranks",
    type=click.IntRange(1),
    help="Devices that share a sequence; by default as many as there are heads for.",
)
@click.option(
    "--device",
    default="a100",
    show_default=True,
    help="What they are: a100, a100-40g, h100, h200, b200, l40s, cpu.",
)
@click.option("--hbm", metavar="BYTES", help="Memory of each device, such as 80GiB.")
@click.option("--host", metavar="BYTES", help="Memory of each node; 80 % of it are used.")
@click.option("--node", type=click.IntRange(1), help="Devices of a node.")
@click.option("--link", metavar="BYTES", help="Per second between host and device, such as 25GB.")
@click.option("--sharing", type=click.IntRange(1), help="Devices behind one such link.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of activations.",
)
@click.option(
    "--states",
    type=click.Choice(["device", "host"]),
    default="device",
    show_default=True,
    help="Where weights, gradients and optimizer are.",
)
@click.option("--exact", is_flag=True, help="Keep what the settings say, whether it fits or not.")
@click.option("--plot", "picture", type=_path, metavar="FILE", help="Draw it: a .png or .svg file.")
@run_options
@as_json
@click.pass_context
def plan(
    ctx: click.Context,
    model: str,
    sequence: str,
    gpus: int,
    ranks: int | None,
    device: str,
    hbm: str | None,
    host: str | None,
    node: int | None,
    link: str | None,
    sharing: int | None,
    dtype: str,
    states: Literal["device", "host"],
    exact: bool,
    picture: Path | None,
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Predict memory and time of a training step; nothing is allocated.

    Layers run as the settings of fpdt say. Where that does not fit, less is kept on the host, which
    is computed twice then, unless --exact is given. The exit status is 0 when the sequence fits, 1
    when it does not, and 2 when nothing can be planned.

    \b
    Example:
      core fpdt plan --model llama-3-8b --sequence 2M --gpus 4 --hbm 80GiB --host 1TiB
      core fpdt plan --model models/mine --sequence 512K --device h200 --plot memory.svg
      core fpdt plan --model gpt-13b --sequence 3M --gpus 8 --set fpdt.chunk_tokens=65536
    """
    from core_fpdt.planning import fitted, plan as make_plan
    from core_fpdt.planning.hardware import hardware
    from core_fpdt.planning.units import parse_bytes, parse_tokens
    from core_fpdt.settings import FPDTSettings

    devices = hardware(device).changed(
        memory=parse_bytes(hbm) if hbm else None,
        host=parse_bytes(host) if host else None,
        node=node,
        link=parse_bytes(link) if link else None,
        sharing=sharing,
    )
    with make_run(ctx, settings, assignments, enable) as run:
        wanted = run.settings(FPDTSettings)
    found = make_plan(
        model,
        parse_tokens(sequence),
        gpus,
        devices,
        wanted,
        ranks=ranks or 0,
        element=2 if dtype == "bfloat16" else 4,
        states=states,
    )
    found = found if exact or found.fits else fitted(found)
    if picture is not None:
        from core_fpdt.planning.drawing import draw

        draw(found, picture)
    if as_json:
        echo_json(found.as_dict())
    else:
        from core_fpdt.planning.report import print_plan

        print_plan(found)
        if picture is not None:
            click.echo(f"wrote {picture}")
    sys.exit(not found.fits)


@fpdt.command()
@click.argument("model")
@run_options
@as_json
@click.pass_context
def probe(
    ctx: click.Context,
    model: str,
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Run every kind of layer of MODEL in chunks and whole, and compare outputs and gradients.

    MODEL is a folder, FAMILY:PRESET of an installed model family, or tiny:CLASS for a tiny model of
    a class of transformers. The exit status is 0 when all layers can be run in chunks, 1 when some
    cannot, and 2 when the model cannot be tried.

    \b
    Example:
      core fpdt probe models/mine
      core fpdt probe tiny:Qwen3 --set fpdt.order=key
    """
    from core_fpdt.probing import probe as probe_model
    from core_fpdt.settings import FPDTSettings

    with make_run(ctx, settings, assignments, enable) as run:
        findings = probe_model(_model(run, model), run.settings(FPDTSettings))
    if as_json:
        echo_json([vars(finding) for finding in findings])
    else:
        rows = [(str(f.layer), str(f.alike), f.kind, f.reason or "same") for f in findings]
        echo_table(("LAYER", "ALIKE", "CLASS", "IN CHUNKS"), rows)
    sys.exit(any(finding.reason for finding in findings))


def _model(run: Run, name: str) -> nn.Module:
    from core.errors import ModelError
    from core.recipes.models import build_model
    from core.testing.tiny import build

    source, _, family = name.partition(":")
    if source != "tiny":
        return build_model(run, name, {})
    try:
        return build(family)
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"no tiny model of {family!r} can be made", why=why) from error
