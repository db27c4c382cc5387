"""What several ranks write with FSDP2, stock readers of torch and safetensors read in one process.

This file is also what the ranks run: ``python test_stock_readers.py FOLDER RANK WORLD_SIZE``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from core_fastpersist import (
    BalancedSavePlanner,
    NativeReader,
    NativeWriter,
    SafetensorsReader,
    SafetensorsWriter,
)

_NATIVE_ONLY = {"complex128"}


class Net(nn.Module):
    """A tied, a bfloat16, an uneven and an empty parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(37, 12)
        self.body = nn.Linear(12, 5, dtype=torch.bfloat16)
        self.head = nn.Linear(12, 37, bias=False)
        self.head.weight = self.embed.weight
        self.none = nn.Parameter(torch.empty(0, 4))


def plain() -> dict[str, torch.Tensor]:
    """What all ranks hold alike, of every kind."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(2**31, (50, 9), dtype=torch.int32, generator=generator)
    return {
        "payloads": words.view(torch.float32),
        "fp8": torch.randn(33, 3, generator=generator).to(torch.float8_e4m3fn),
        "complex64": torch.randn(21, dtype=torch.complex64, generator=generator),
        "complex128": torch.randn(21, dtype=torch.complex128, generator=generator),
        "scalar": torch.tensor(2.5),
        "flags": torch.tensor([True, False, True]),
    }


def expected() -> dict[str, torch.Tensor]:
    net = {f"net.{name}": tensor for name, tensor in Net().state_dict().items()}
    return {**net, **{f"plain.{name}": tensor for name, tensor in plain().items()}}


def rank_main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    net = fully_shard(Net(), mesh=mesh)
    state: dict[str, Any] = {"net": net.state_dict(), "plain": plain(), "step": 7}
    dcp.save(state, storage_writer=NativeWriter(folder / "native"), planner=BalancedSavePlanner())
    state["plain"] = {n: t for n, t in plain().items() if n not in _NATIVE_ONLY}
    writer = SafetensorsWriter(folder / "shards")
    dcp.save(state, storage_writer=writer, planner=BalancedSavePlanner())
    # Back into the shards of as many ranks, by our own readers.
    for reader in (NativeReader(folder / "native"), SafetensorsReader(folder / "shards")):
        fresh = fully_shard(Net(), mesh=mesh)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.zero_()
        target = {"net": fresh.state_dict()}
        dcp.load(target, storage_reader=reader)
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor.to_local(), target["net"][name].to_local()), name
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both formats, saved by 2 or 4 gloo ranks."""
    folder = tmp_path_factory.mktemp("saved")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(request.param), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **world, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(request.param)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    return folder


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


def nested_room(names: dict[str, torch.Tensor]) -> dict[str, Any]:
    room: dict[str, Any] = {"net": {}, "plain": {}}
    for name, tensor in names.items():
        part, _, rest = name.partition(".")
        room[part][rest] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return room


def check(room: dict[str, Any], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        part, _, rest = name.partition(".")
        assert same_bits(room[part][rest], tensor), name


def test_stock_dcp_reads_the_native_format(saved: Path) -> None:
    room = nested_room(expected()) | {"step": 0}
    dcp.load(room, checkpoint_id=saved / "native")
    check(room, expected())
    assert room["step"] == 7


def test_the_reader_of_torch_reads_the_shards(saved: Path) -> None:
    wanted = {n: t for n, t in expected().items() if n.partition(".")[2] not in _NATIVE_ONLY}
    room = nested_room(wanted)
    dcp.load(room, storage_reader=HuggingFaceStorageReader(str(saved / "shards")))
    check(room, wanted)


def test_safetensors_opens_every_shard(saved: Path) -> None:
    wanted = expected()
    seen: dict[str, int] = {}
    for path in sorted((saved / "shards").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 # it has no other way to iterate
                seen[name] = seen.get(name, 0) + file.get_tensor(name).numel()
    assert seen.keys() == {n for n in wanted if n.partition(".")[2] not in _NATIVE_ONLY}
    assert all(count == wanted[name].numel() for name, count in seen.items())


def test_objects_come_back_from_the_shards(saved: Path) -> None:
    room = {"step": 0}
    dcp.load(room, storage_reader=SafetensorsReader(saved / "shards"))
    assert room["step"] == 7


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
