"""``core generate``: complete prompts with a local model and the chosen engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from core.cli.options import as_json, make_run, run_options
from core.cli.table import echo_json


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text. Repeatable.")
@click.option("--max-new-tokens", default=64, show_default=True, help="Tokens to make at most.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True, help="Nucleus of the distribution.")
@click.option("--top-k", default=0, show_default=True, help="Most likely tokens to keep; 0: all.")
@click.option("--seed", default=0, show_default=True, help="Seed of every prompt's generator.")
@run_options
@as_json
@click.pass_context
def generate(
    ctx: click.Context,
    model: Path,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    settings: Path | None,
    assignments: tuple[str, ...],
    enable: tuple[str, ...],
    as_json: bool,
) -> None:
    """Complete prompts with MODEL, a local folder in the Hugging Face layout.

    \b
    Example:
      core generate runs/quickstart/model --prompt "def main(" --max-new-tokens 32
    """
    from core.contributions import MODEL
    from core.engines import Sampling, generate as answer
    from core.recipes.models import load_model
    from core.recipes.tokens import load_tokenizer
    from core.settings import check

    with make_run(ctx, settings, assignments, enable) as run:
        tokenizer: Any = load_tokenizer(model)
        stop = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        sampling = check(
            Sampling,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_ids=stop,
        )
        loaded = run.apply(MODEL, load_model(model).to(run.device))
        engine = run.engine(loaded)
        try:
            ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
            answers = answer(engine, ids, sampling)
        finally:
            engine.close()
    results = [
        {
            "prompt": prompt,
            "text": tokenizer.decode(a.ids, skip_special_tokens=True),
            "tokens": len(a.ids),
            "finish": a.finish,
        }
        for prompt, a in zip(prompts, answers, strict=True)
    ]
    if as_json:
        echo_json(results)
        return
    for result in results:
        click.echo(f"{result['prompt']}{result['text']}")
