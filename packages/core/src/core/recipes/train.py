"""The training recipe: a causal language model on local text, on one process or many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from core.contributions import BATCH, MODEL
from core.errors import DataError
from core.events import StepEnded
from core.recipes.models import build_model, quiet_transformers
from core.recipes.optim import build_optimizers, build_schedulers
from core.recipes.parallel import clip, gradient_sync, mean_over_ranks, parallelize, unwrap
from core.recipes.report import Report, plot_losses
from core.recipes.settings import TrainSettings
from core.recipes.tokens import Data, Order, prepare

if TYPE_CHECKING:
    from core.run import Run


@dataclass(frozen=True)
class Trained:
    """What training leaves in memory: the model, its data and the last figures."""

    model: nn.Module
    data: Data
    metrics: Mapping[str, Any]


def train(run: Run) -> Mapping[str, Any]:
    """Train as the section ``[train]`` says; the entry of ``core run train``."""
    trained = train_model(run)
    if run.is_main:
        plot_losses(run.folder, {})
    return trained.metrics


def train_model(run: Run) -> Trained:
    """Train a model and leave checkpoints, metrics and an export in the run's folder.

    Raises:
        DataError: for text that is missing or too little, a batch that cannot be divided, or ranks
            that cannot share sequences.
        CheckpointError: when a checkpoint cannot be saved, or none is there to resume from.
    """
    wanted = run.settings(TrainSettings)
    run.ranks.share_sequences(wanted.sequence_ranks)
    shares = run.ranks.data_ranks
    rows = wanted.batch_size // (shares * wanted.accumulate)
    if rows * shares * wanted.accumulate != wanted.batch_size:
        who = "ranks" if wanted.sequence_ranks == 1 else "groups of ranks"
        raise DataError(
            f"train.batch_size = {wanted.batch_size} cannot be divided",
            why=f"there are {shares} {who} and {wanted.accumulate} accumulation steps",
        )
    torch.manual_seed(wanted.seed)
    data = prepare(run, wanted)
    config = {"vocab_size": len(data.tokenizer), **wanted.config} if ":" in wanted.model else {}
    model = run.apply(MODEL, build_model(run, wanted.model, config).to(run.device))
    model = parallelize(model, run, wanted.parallel).train()
    optimizers = build_optimizers(model, wanted)
    schedulers = build_schedulers(optimizers, wanted)
    state = {"model": model, **optimizers, **schedulers}
    done = run.load(state).step if run.resume else 0
    if run.resume:
        run.write_description()
    order = Order(data.training, wanted.batch_size, wanted.seed)
    metrics: dict[str, float] = {}
    with Report(run, wanted.steps, done) as report:
        for step in range(done + 1, wanted.steps + 1):
            mine = order.batch(step - 1).view(wanted.accumulate, shares, rows, -1)
            loss = torch.zeros((), device=run.device)
            for index, ids in enumerate(mine[:, run.ranks.data_rank]):
                with gradient_sync(model, index == wanted.accumulate - 1):
                    part = loss_of(model, ids, run, wanted) / wanted.accumulate
                    part.backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
            metrics = {"loss": mean_over_ranks(loss, run), "gradient": clip(model, wanted.clip)}
            for optimizer, scheduler in zip(optimizers.values(), schedulers.values(), strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if is_due(step, wanted.evaluate_every, wanted.steps):
                metrics["held_out_loss"] = evaluate(model, data.held_out, run, wanted)
            report.step(step, wanted.batch_size * wanted.sequence_length, metrics)
            run.emit(StepEnded(step=step, metrics=metrics))
            if is_due(step, wanted.save_every, wanted.steps):
                run.save(state, step)
        speed = report.tokens_per_second
    run.checkpoints.wait()
    if not metrics:
        metrics = {"held_out_loss": evaluate(model, data.held_out, run, wanted)}
    export(model, data, run)
    parameters = sum(p.numel() for p in model.parameters())
    figures = {**metrics, "steps": wanted.steps, "parameters": parameters}
    return Trained(unwrap(model), data, {**figures, "tokens_per_second": speed})


def loss_of(model: nn.Module, ids: Tensor, run: Run, wanted: TrainSettings) -> Tensor:
    """Mean next-token loss of a batch of (sequences, length) ids, in nats per token.

    Where ranks share sequences it is this rank's part of it: their mean is the loss.

    Raises:
        DataError: where ranks are to share sequences that nobody has cut for them.
    """
    ids = ids.to(run.device)
    batch = run.apply(BATCH, {"input_ids": ids, "labels": ids})
    sharing = run.ranks.sequence_ranks
    if sharing > 1 and batch["input_ids"].shape == ids.shape:
        raise DataError(
            f"train.sequence_ranks = {sharing}, but no transform cuts sequences",
            why=f"the plan is: {', '.join(run.plan.ids) or 'no transforms'}",
            fix="enable a plugin for sequence parallelism, or set train.sequence_ranks = 1",
        )
    with autocast(run, wanted):
        return cast(Tensor, model(**batch, use_cache=False).loss)


def evaluate(model: nn.Module, held_out: Tensor, run: Run, wanted: TrainSettings) -> float:
    """Mean loss over held-out sequences; every rank, or group of ranks, sees all of them."""
    model.eval()
    with torch.no_grad():
        parts = torch.split(held_out, 16)
        total = sum(float(loss_of(model, part, run, wanted)) * len(part) for part in parts)
    model.train()
    mean = torch.tensor(total / len(held_out), dtype=torch.float64, device=run.device)
    return mean_over_ranks(mean, run)


def autocast(run: Run, wanted: TrainSettings) -> AbstractContextManager[Any]:
    """Autocast to bfloat16 where the settings ask for it."""
    on = wanted.precision == "bfloat16"
    return torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=on)


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens ``every`` steps, and at the last one, happens now."""
    return step == last or (every > 0 and step % every == 0)


def export(model: nn.Module, data: Data, run: Run) -> Path:
    """Write the model and its tokenizer as a Hugging Face folder, ``<run folder>/model``."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    folder = run.folder / "model"
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    if run.is_main:
        quiet_transformers()
        inner: Any = unwrap(model)
        inner.save_pretrained(str(folder), state_dict=weights)
        data.tokenizer.save_pretrained(str(folder))
    return folder
