"""``core serve``: the chosen engine behind the OpenAI API."""

from __future__ import annotations

import json
from pathlib import Path

import click

from core.cli.options import as_json, make_run, run_options


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to bind to.")
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="TCP port; 0 takes a free one.",
)
@click.option(
    "--api-key",
    default="",
    envvar="CORE_API_KEY",
    show_envvar=True,
    help="What clients have to know. Rather use the variable: others see command lines.",
)
@click.option("--name", default="", help="What clients call the model; its folder's name if empty.")
@click.option(
    "--max-body",
    default=8 * 2**20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Bytes of a request at most.",
)
@click.option(
    "--max-queue",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    help="Answers that may wait for their first token; further ones are refused (429).",
)
@click.option(
    "--max-tokens-default",
    default=4096,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens of a chat's answer where the client does not say.",
)
@click.option(
    "--stuck-after",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds without a pass, while requests wait, until /health fails.",
)
@click.option(
    "--grace",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Seconds that running answers may take after SIGTERM.",
)
@click.option(
    "--tool-format",
    default="auto",
    show_default=True,
    help="How the model writes calls of tools: auto, hermes, llama, mistral, qwen_xml or json.",
)
@click.option(
    "--replicas",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Processes with an engine each, run by Ray Serve; 0 serves from this process, without Ray.",
)
@run_options
@as_json
@click.pass_context
def serve(
    ctx: click.Context,
    model: Path,
    host: str,
    port: int,
    api_key: str,
    name: str,
    max_body: int,
    max_queue: int,
    max_tokens_default: int,
    stuck_after: float,
    grace: float,
    tool_format: str,
    replicas: int,
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Serve MODEL, a local folder in the Hugging Face layout, with the OpenAI API and a chat page.

    With --json, prints one line with address and model when calls can come.

    \b
    Example:
      core serve runs/quickstart/model --port 8000
      curl localhost:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "model", "prompt": "def main("}'
    """
    from core_splitfuse.serving.app import create_app
    from core_splitfuse.serving.guards import is_loopback
    from core_splitfuse.serving.opening import open_model
    from core_splitfuse.serving.server import serve as listen

    called = name or model.resolve().name
    local = is_loopback(host)
    if not local and not api_key:
        click.echo("warning: everybody who reaches this address can use it: no API key", err=True)
    hosts = frozenset({host.lower()}) if local else None

    def ready(address: str) -> None:
        told = json.dumps({"address": address, "model": called})
        click.echo(told if as_json else f"{called} is served at {address}")

    with make_run(ctx, settings, assignments, enable) as run:
        if replicas:
            from core_splitfuse.replicas.fleet import Fleet, options_for
            from core_splitfuse.replicas.front import create_front
            from core_splitfuse.replicas.recipe import Recipe

            recipe = Recipe.of(
                ctx,
                settings,
                assignments,
                enable,
                model=model.resolve(),
                name=called,
                max_body=max_body,
                max_queue=max_queue,
                max_tokens_default=max_tokens_default,
                stuck_after=stuck_after,
                tool_format=tool_format,
            )
            with Fleet(recipe, options_for(replicas, run.device.type, grace)) as fleet:
                front = create_front(fleet, api_key=api_key, max_body=max_body, hosts=hosts)
                listen(front, fleet, host=host, port=port, grace=grace, ready=ready)
            return
        loop, served = open_model(
            run,
            model,
            name=called,
            max_waiting=max_queue,
            stuck_after=stuck_after,
            tool_format=tool_format,
        )
        with loop:
            app = create_app(
                loop,
                served,
                api_key=api_key,
                max_body=max_body,
                default_tokens=max_tokens_default,
                hosts=hosts,
            )
            listen(app, loop, host=host, port=port, grace=grace, ready=ready)
