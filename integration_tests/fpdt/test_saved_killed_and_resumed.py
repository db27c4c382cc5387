"""Two ranks that share sequences are saved every other step, killed, and go on as one process.

The losses are those of a run that nothing happened to: on one rank, without chunks.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import core
from core.checkpoints import convert
from core.distributed import Ranks
from core.recipes.settings import TrainSettings
from core.recipes.tokens import load_tokenizer, prepare
from core.recipes.train import train_model
from core.testing import tiny

fpdt = pytest.importorskip("core_fpdt", reason="core-fpdt is not installed")
pytest.importorskip("core_fastpersist", reason="core-fastpersist is not installed")

STEPS = 8
SAME = {"rel": 1e-4}
"""Of losses: float32, added up in another order on other ranks."""

TRAIN: dict[str, Any] = {
    "model": "small:tiny",
    "steps": STEPS,
    "save_every": 2,
    "evaluate_every": 3,
    "text_limit": 60_000,
    "vocabulary": 300,
    "sequence_length": 50,
    "evaluate_sequences": 8,
    "batch_size": 4,
}
CHUNKS = {"chunk_tokens": 16}
SAVING = {"format": "fastpersist", "keep": 9}


def write_settings(path: Path) -> None:
    """Settings of the ranks, as a user would write them."""

    def lines(section: str, values: dict[str, Any]) -> str:
        return "".join([f"[{section}]\n", *(f"{k} = {json.dumps(v)}\n" for k, v in values.items())])

    shared = lines("train", {**TRAIN, "sequence_ranks": 2, "parallel": "fsdp2"})
    path.write_text(
        'enable = ["fpdt"]\n' + shared + lines("fpdt", CHUNKS) + lines("checkpoint", SAVING)
    )


def losses(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def require_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [set(line) for line in found] == [set(line) for line in expected]
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, **SAME)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Metrics of a run on one rank, whole layers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with core.start(folder=folder, quiet=True, ranks=Ranks(), train=TRAIN) as run:
        train_model(run)
    return losses(folder)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on two ranks that was killed after four of its steps were saved."""
    root = tmp_path_factory.mktemp("killed")
    folder = root / "run"
    write_settings(root / "settings.toml")
    call = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "core"]
    more = ["run", "train", "--settings", str(root / "settings.toml"), "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (root / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, *call, *more],
            env=environment,
            stdout=said,
            stderr=said,
            start_new_session=True,  # all ranks are killed with one signal
        )
        saved = folder / "checkpoints" / "step-00000004"
        end = time.monotonic() + 300
        while time.monotonic() < end and process.poll() is None and not saved.is_dir():
            time.sleep(0.002)
        assert process.poll() is None, (root / "said.txt").read_text()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert saved.is_dir()
    # However far the ranks came meanwhile, they go on from here.
    for later in (folder / "checkpoints").glob("*"):
        if later.name > saved.name:
            shutil.rmtree(later)
    return folder


def test_two_ranks_computed_what_one_does(
    killed: Path, undisturbed: list[dict[str, float]]
) -> None:
    require_same(losses(killed)[:4], undisturbed[:4])


def test_one_rank_goes_on(
    killed: Path, undisturbed: list[dict[str, float]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    with core.start(
        killed.parent / "settings.toml",
        folder=folder,
        quiet=True,
        ranks=Ranks(),
        resume=True,
        set=["train.sequence_ranks=1"],
    ) as run:
        train_model(run)
    require_same(losses(folder), undisturbed)


def test_one_rank_goes_on_from_a_universal_checkpoint(
    killed: Path, undisturbed: list[dict[str, float]], tmp_path: Path
) -> None:
    """What core-ucp made of it, loaded by a loop of its own, in whole layers."""
    training = pytest.importorskip("core_ucp.quickstart.training", reason="core-ucp is missing")
    source = killed / "checkpoints" / "step-00000004"
    with core.start(folder=tmp_path / "convert", quiet=True, ranks=Ranks()) as run:
        convert.execute(convert.plan(source, tmp_path / "universal", "universal", run))
        wanted = {**TRAIN, "tokenizer": str(killed / "tokenizer")}
        shared = core.start(folder=tmp_path / "data", quiet=True, ranks=Ranks(), train=wanted)
        with shared:
            data = prepare(shared, shared.settings(TrainSettings))
    settings = tmp_path / "settings.toml"
    settings.write_text("[train]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in TRAIN.items()))
    leg = training.Leg(
        settings=settings,
        vocabulary=len(load_tokenizer(killed / "tokenizer")),
        training=data.training,
        source=tmp_path / "universal",
        steps=STEPS - 4,
        folder=tmp_path / "leg",
    )
    found = training.train(leg, Ranks())
    assert found == pytest.approx([line["loss"] for line in undisturbed[4:]], **SAME)


def adapted() -> nn.Module:
    """A tiny decoder with adapters of peft."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    torch.manual_seed(3)
    model: nn.Module = peft.get_peft_model(tiny.llama(), config)
    return model.train()


def train_adapters(model: nn.Module, run: core.Run, first: int, last: int) -> list[Tensor]:
    """Train from one step to another, from the newest checkpoint unless it is the first."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    state = {"model": model, "optimizer": optimizer}
    if first:
        assert run.load(state).step == first
    found = []
    for step in range(first, last):
        loss = model(**tiny.batch(step, length=50), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    run.save(state, last).durable()
    return found


def test_adapters_are_trained_in_chunks_saved_and_resumed(tmp_path: Path) -> None:
    with core.start(folder=tmp_path / "whole", quiet=True, ranks=Ranks()) as run:
        expected = train_adapters(adapted(), run, 0, 4)
    found: list[Tensor] = []
    for first, last in ((0, 2), (2, 4)):
        with core.start(
            folder=tmp_path / "chunks", quiet=True, ranks=Ranks(), checkpoint=SAVING
        ) as run:
            model = adapted()
            enabled = fpdt.enable(model, **CHUNKS)
            found += train_adapters(model, run, first, last)
            enabled.disable()
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=0)
