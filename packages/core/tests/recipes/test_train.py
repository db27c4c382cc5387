"""The training recipe in one process, and the same parts in other people's loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import core
from core.contributions import BATCH, MODEL, Phase
from core.discovery import discover
from core.hooks import Hooks
from core.integrations.transformers import CoreCallback
from core.plugins import Plugin, Plugins, State
from core.recipes.models import build_model, load_model
from core.recipes.train import train_model
from core.testing.tiny import build

TINY = {
    "model": "small:tiny",
    "steps": 4,
    "save_every": 2,
    "evaluate_every": 2,
    "text_limit": 60_000,
    "vocabulary": 300,
    "sequence_length": 32,
    "evaluate_sequences": 8,
}


def settings(**changes: Any) -> dict[str, Any]:
    return {**TINY, **changes}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_gradient_accumulation_changes_nothing(tmp_path: Path) -> None:
    losses = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        with core.start(folder=folder, train=settings(accumulate=parts)) as run:
            train_model(run)
        losses.append([line["loss"] for line in metrics(folder)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_autocast_and_adamw_train(tmp_path: Path) -> None:
    train = settings(precision="bfloat16", optimizer="adamw", steps=12, warmup_steps=2)
    with core.start(folder=tmp_path, train=train) as run:
        train_model(run)
    lines = metrics(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_hugging_face_folder_is_trained_on_own_text(tmp_path: Path) -> None:
    with core.start(folder=tmp_path / "first", train=settings()) as run:
        trained = train_model(run)
    (tmp_path / "notes.jsonl").write_text(
        "".join(json.dumps({"text": f"note {i} " * 40}) + "\n" for i in range(40))
    )
    train = settings(model=str(tmp_path / "first/model"), text=[str(tmp_path / "notes.jsonl")])
    with core.start(folder=tmp_path / "second", train=train) as run:
        again = train_model(run)
    assert type(again.model) is type(trained.model)
    assert metrics(tmp_path / "second")[-1]["loss"] < metrics(tmp_path / "first")[0]["loss"]
    exported = load_model(tmp_path / "second/model")
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor)


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with (
        core.start(folder=tmp_path, train=settings(accumulate=3)) as run,
        pytest.raises(core.DataError, match="3 accumulation steps"),
    ):
        train_model(run)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "nobody_knows"}, "(?s)nobody_knows.*install the package that made it"),
        ({"quant_method": "core_fp6"}, "(?s)core_fp6.*pip install core-fp6"),
        ("fp6", "config.json"),
    ],
)
def test_weights_that_nothing_installed_reads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any, reason: str
) -> None:
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "core_fp6", raising=False)
    build("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(core.ModelError, match=reason):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("smal:tiny", {}, "did you mean 'small'"),
        ("small:huge", {}, "tiny, quickstart"),
        ("small:tiny", {"layers": 3}, "'layers'"),
        ("nowhere", {}, "config.json"),
    ],
)
def test_unknown_models_are_refused(
    tmp_path: Path, name: str, config: dict[str, Any], reason: str
) -> None:
    with (
        core.start(folder=tmp_path) as run,
        pytest.raises(core.ModelError, match=reason),
    ):
        build_model(run, name, config)


def freeze_embeddings(model: nn.Module, run: core.Run) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed" not in name)
    return model


def mask_first_label(batch: Any, run: core.Run) -> Any:
    labels = batch["labels"].clone()
    labels[:, :2] = -100
    return {**batch, "labels": labels}


def with_transforms(events: list[core.Event]) -> Plugins:
    """The plugins of this process and one more that changes model and batch."""

    def transforms(run: core.Run) -> list[core.Transform[Any]]:
        return [
            core.Transform(stage=MODEL, name="freeze", apply=freeze_embeddings),
            core.Transform(stage=BATCH, name="mask", apply=mask_first_label, phase=Phase.KERNEL),
        ]

    def observe(run: core.Run, event: core.Event) -> None:
        events.append(event)

    hooks = {Hooks.core_transforms.__name__: transforms, Hooks.core_event.__name__: observe}
    return Plugins([*discover(), Plugin(name="demo", state=State.ACTIVE, implementations=hooks)])


def test_enabled_transforms_and_events_reach_the_recipe(tmp_path: Path) -> None:
    events: list[core.Event] = []
    plugins = with_transforms(events)
    with core.start(folder=tmp_path, plugins=plugins, enable=["demo"], train=settings()) as run:
        trained = train_model(run)
    frozen = [n for n, p in trained.model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    names = [type(event).__name__ for event in events]
    assert names[0] == "RunStarted"
    assert names[-1] == "RunEnded"
    assert names.count("StepEnded") == 4
    assert names.count("CheckpointSaved") == 2


def test_a_plugin_that_is_not_named_changes_nothing(tmp_path: Path) -> None:
    with core.start(folder=tmp_path, plugins=with_transforms([]), train=settings()) as run:
        trained = train_model(run)
    assert all(parameter.requires_grad for parameter in trained.model.parameters())


def trainer(folder: Path, run: core.Run, steps: int, **callback: Any) -> Trainer:
    torch.manual_seed(0)
    model = build("Llama")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 64, (64, 8), generator=generator).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [CoreCallback(run, **callback)]
    return Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks)


def test_the_trainer_of_transformers_saves_and_resumes(tmp_path: Path) -> None:
    events: list[core.Event] = []
    with core.start(folder=tmp_path / "run", plugins=with_transforms(events)) as run:
        first = trainer(tmp_path / "hf", run, 3, save_every=2)
        first.train()
        saved = sorted(path.name for path in run.checkpoints.directory.glob("step-*"))
    assert saved == ["step-00000002", "step-00000003"]
    steps = [event.step for event in events if isinstance(event, core.StepEnded)]
    assert steps[:3] == [1, 2, 3]
    with core.start(folder=tmp_path / "run") as run:
        second = trainer(tmp_path / "hf", run, 3, resume=True)
        second.train()
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)
