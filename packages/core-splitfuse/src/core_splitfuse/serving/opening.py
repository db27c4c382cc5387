"""From a folder to something that answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_splitfuse.serving.loop import EngineLoop
from core_splitfuse.serving.served import Served

if TYPE_CHECKING:
    from core import Run


def open_model(
    run: Run,
    folder: Path,
    *,
    name: str = "",
    max_waiting: int = 256,
    stuck_after: float = 60.0,
    tool_format: str = "auto",
) -> tuple[EngineLoop, Served]:
    """Load a model, and start the engine that the settings choose.

    Args:
        run: with the settings.
        folder: model and tokenizer in the Hugging Face layout.
        name: what clients call the model; the folder's name if empty.
        max_waiting: requests that may wait for their first token.
        stuck_after: seconds without a pass, while there is work, until the engine counts as stuck.
        tool_format: how the model writes calls of tools.

    Returns:
        The loop, which whoever called this closes, and the model.
    """
    from core.contributions import MODEL
    from core.recipes.models import load_model
    from core.recipes.tokens import load_tokenizer

    model = run.apply(MODEL, load_model(folder).to(run.device)).requires_grad_(False)
    tokenizer: Any = load_tokenizer(folder)
    engine = run.engine(model)
    served = Served.of(
        model,
        tokenizer,
        name or folder.resolve().name,
        context=engine.stats().kv_total,
        tool_format=tool_format,
    )
    return EngineLoop(engine, max_waiting=max_waiting, stuck_after=stuck_after), served
