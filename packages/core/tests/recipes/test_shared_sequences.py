"""Ranks that share sequences get the same ones, and train as one rank does; or none starts.

This file is also what the ranks run: ``python test_shared_sequences.py FOLDER``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

import core
from core.contributions import BATCH
from core.discovery import discover
from core.distributed import Ranks
from core.hooks import Hooks
from core.plugins import Plugin, Plugins, State
from core.recipes.train import train_model

TRAIN: dict[str, Any] = {
    "model": "small:tiny",
    "steps": 3,
    "evaluate_every": 2,
    "text_limit": 60_000,
    "vocabulary": 300,
    "sequence_length": 32,
    "evaluate_sequences": 8,
    "accumulate": 2,
}


def halve(batch: MutableMapping[str, Tensor], run: core.Run) -> MutableMapping[str, Tensor]:
    """Cut a batch for two ranks; rows will do where it is the recipe that is tested."""
    return {name: tensor.chunk(2)[run.rank % 2] for name, tensor in batch.items()}


def transforms(run: core.Run) -> Iterable[core.Transform[Any]]:
    yield core.Transform(stage=BATCH, name="halve", apply=halve)


def plugins() -> Plugins:
    hooks = {Hooks.core_transforms.__name__: transforms}
    return Plugins([*discover(), Plugin(name="demo", state=State.ACTIVE, implementations=hooks)])


def rank_main(folder: Path) -> None:
    dist.init_process_group("gloo")  # one for both runs
    train = {**TRAIN, "sequence_ranks": 2}
    with core.start(folder=folder / "whole", quiet=True, plugins=plugins(), train=train) as run:
        try:
            train_model(run)
        except core.DataError as error:
            (folder / f"heard-{run.rank}.txt").write_text(str(error))
    with core.start(
        folder=folder / "shared", quiet=True, plugins=plugins(), enable=["demo"], train=train
    ) as run:
        train_model(run)
        assert run.mesh is not None
        facts = {"names": run.mesh.mesh_dim_names, "sizes": list(run.mesh.shape)}
        (folder / f"mesh-{run.rank}.json").write_text(json.dumps(facts))
    os._exit(0)  # torch's own threads, still ending, were once seen to abort the exit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left."""
    folder = tmp_path_factory.mktemp("shared")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LOCAL_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**common, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=300)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
    return folder


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_they_train_and_evaluate_as_one_rank_does(folder: Path, tmp_path: Path) -> None:
    with core.start(folder=tmp_path, quiet=True, ranks=Ranks(), train=TRAIN) as run:
        train_model(run)
    found, expected = metrics(folder / "shared"), metrics(tmp_path)
    assert [set(line) for line in found] == [set(line) for line in expected]
    for one, two in zip(found, expected, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert "held_out_loss" in found[1]


def test_they_are_a_dimension_of_the_mesh(folder: Path) -> None:
    for rank in range(2):
        facts = json.loads((folder / f"mesh-{rank}.json").read_text())
        assert facts == {"names": ["dp", "sp"], "sizes": [1, 2]}


def test_without_a_transform_that_cuts_all_stop(folder: Path) -> None:
    for rank in range(2):
        heard = (folder / f"heard-{rank}.txt").read_text()
        assert "no transform cuts sequences: the plan is: no transforms" in heard
        assert "enable a plugin for sequence parallelism" in heard


def test_neighbours_share_and_groups_have_data_of_their_own() -> None:
    places = []
    for rank in range(6):
        ranks = Ranks(rank=rank, world_size=6)
        ranks.share_sequences(3)
        places.append((ranks.data_rank, ranks.data_ranks))
    assert places == [(0, 2)] * 3 + [(1, 2)] * 3
    alone = Ranks(rank=5, world_size=6)
    assert (alone.data_rank, alone.data_ranks) == (5, 6)


def test_ranks_that_cannot_be_divided_are_refused(tmp_path: Path) -> None:
    with pytest.raises(core.DataError, match="4 ranks cannot share each sequence: there are 6"):
        Ranks(world_size=6).share_sequences(4)
    train = {**TRAIN, "sequence_ranks": 2}
    with (
        core.start(folder=tmp_path, quiet=True, ranks=Ranks(), train=train) as run,
        pytest.raises(core.DataError, match="there are 1 ranks"),
    ):
        train_model(run)


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
