"""transformers' Trainer with a model in chunks: the same losses, evaluation and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from core.testing import tiny
from core_fpdt import enable

LIMIT = 16 * 1024
"""Bytes of logits: 10 tokens at a time."""


class Texts(Dataset[dict[str, Tensor]]):
    """Texts of 37 tokens, some padded on the right."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, tiny.VOCABULARY, (count, 37), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, real = self.ids[index], torch.ones(37, dtype=torch.int64)
        real[37 - index % 5 :] = 0
        return {
            "input_ids": ids,
            "attention_mask": real,
            "labels": ids.masked_fill(real == 0, -100),
        }


def trainer(model: nn.Module, folder: Path, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = TrainingArguments(output_dir=str(folder), **(settings | changes))
    return Trainer(
        model=model, args=arguments, train_dataset=Texts(16, 0), eval_dataset=Texts(6, 1)
    )


def losses(trained: Any) -> list[float]:
    names = ("loss", "eval_loss")
    return [line[name] for line in trained.state.log_history for name in names if name in line]


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 1}, {"prediction_loss_only": True}, {"bf16": True}],
    ids=["plain", "no accumulation", "loss only", "autocast"],
)
def test_losses_are_those_of_the_model_as_it_is(changes: Any, tmp_path: Path) -> None:
    model = tiny.llama()
    plain = trainer(copy.deepcopy(model), tmp_path / "plain", **changes)
    plain.train()
    with enable(model, chunk_tokens=8, loss_chunk_bytes=LIMIT):
        ours = trainer(model, tmp_path / "ours", **changes)
        ours.train()
    assert len(losses(plain)) == 6
    tolerance = 1e-2 if changes.get("bf16") else 1e-5
    assert losses(ours) == pytest.approx(losses(plain), rel=tolerance)
    assert losses(plain)[0] != pytest.approx(losses(plain)[-2], rel=1e-3), "nothing was learnt"


def test_a_checkpoint_goes_on_with_and_without_chunks(tmp_path: Path) -> None:
    whole = tiny.llama()
    trainer(whole, tmp_path / "plain").train()
    first = tiny.llama()
    with enable(first, chunk_tokens=8, loss_chunk_bytes=LIMIT):
        trainer(first, tmp_path / "ours").train()
    half = str(tmp_path / "ours" / "checkpoint-2")
    for chunked in (True, False):
        model = tiny.llama(seed=7)
        enabled = enable(model, chunk_tokens=8, loss_chunk_bytes=LIMIT) if chunked else None
        trainer(model, tmp_path / f"again {chunked}").train(resume_from_checkpoint=half)
        if enabled is not None:
            enabled.disable()
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_metrics_of_predictions_see_real_logits(tmp_path: Path) -> None:
    def accuracy(predictions: Any) -> dict[str, float]:
        logits, labels = predictions
        assert logits.shape == (6, 37, tiny.VOCABULARY)
        return {"right": float((logits.argmax(-1) == labels).mean()), "sum": float(logits.sum())}

    model = tiny.llama()
    found = []
    for chunked in (False, True):
        enabled = enable(model, chunk_tokens=8, loss_chunk_bytes=LIMIT) if chunked else None
        evaluating = trainer(model, tmp_path / str(chunked))
        evaluating.compute_metrics = accuracy
        result = evaluating.evaluate()
        found.append([result["eval_right"], result["eval_sum"], result["eval_loss"]])
        if enabled is not None:
            enabled.disable()
    assert found[1] == pytest.approx(found[0], rel=1e-4)
