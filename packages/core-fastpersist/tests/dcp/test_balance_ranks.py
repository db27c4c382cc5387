"""Replicated state is shared evenly by the ranks that hold it, and stock DCP reads the result.

This file is also what the ranks run: ``python test_balance_ranks.py ROOT SAVED`` saves every state into
a folder for its number of ranks, then reads what ``SAVED`` other ranks have saved.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from core_fastpersist.dcp import balance
from core_fastpersist.dcp.balance import BalancedSavePlanner
from core_fastpersist.dcp.places import Place, Writers


def noise(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random bits, so that there are NaNs of every payload."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    return (
        torch.randint(256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
    )


def replicated() -> dict[str, Any]:
    """What every rank holds alike."""
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((257, 33), torch.float32),
        ((1000, 7), torch.bfloat16),
        ((64, 16), torch.float8_e4m3fn),
        ((3, 5, 7), torch.float8_e5m2),
        ((41,), torch.int64),
        ((9, 4), torch.complex64),
        ((1, 300), torch.float32),
        ((), torch.float32),
        ((), torch.bfloat16),
        ((0, 5), torch.float32),
        ((5, 0), torch.float16),
        ((0,), torch.int8),
    ]
    weights = {f"t{i}": noise(i, *one) for i, one in enumerate(shapes)}
    weights["turned"] = noise(90, (40, 30), torch.float32).t()
    weights["tied"] = weights["t0"]
    weights["random state"] = noise(91, (5056,), torch.uint8)
    extra = {"rate": 0.1, "name": "run", "steps": [1, 2, 3], "deep": [{"x": torch.ones(3)}]}
    return {"model": weights, "extra": extra, "step": 7}


def private(rank: int) -> torch.Tensor:
    return noise(1000 + rank, (rank + 3, 2), torch.float32)


def common_state() -> dict[str, Any]:
    """DDP: the same on all ranks, and a tensor and an object of each rank's own."""
    rank = dist.get_rank()
    return {**replicated(), f"own{rank}": private(rank), f"tag{rank}": f"of rank {rank}"}


class Net(torch.nn.Module):
    """Parameters that divide badly, among them some that leave ranks without any row."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(10, 7)
        self.b = torch.nn.Linear(7, 1)
        self.c = torch.nn.Linear(6, 64, dtype=torch.bfloat16)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = noise(50 + i, tuple(parameter.shape), parameter.dtype)


def sharded_state(*mesh: int) -> dict[str, Any]:
    """FSDP2 on a mesh with one dimension, HSDP on one with two."""
    names = ("replicate", "shard")[-len(mesh) :]
    net = fully_shard(Net(), mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    return dict(net.state_dict())


def mixed_state() -> dict[str, Any]:
    """HSDP, columns of a tensor with replicas, a replicated DTensor, and a plain tensor."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    columns = distribute_tensor(noise(70, (33, 6), torch.float32), mesh, [Replicate(), Shard(1)])
    everywhere = distribute_tensor(noise(71, (50, 3), torch.float32), mesh, [Replicate()] * 2)
    plain = noise(72, (21, 2), torch.float32)
    more = {"columns": columns, "everywhere": everywhere, "plain": plain}
    return {**sharded_state(2, 2), **more}


def expected_mixed() -> dict[str, torch.Tensor]:
    more = {
        "columns": noise(70, (33, 6), torch.float32),
        "everywhere": noise(71, (50, 3), torch.float32),
        "plain": noise(72, (21, 2), torch.float32),
    }
    return {**Net().state_dict(), **more}


def rank_main(root: Path, saved: int) -> None:
    """Save on these ranks, then read what others have saved."""
    warnings.simplefilter("ignore")
    store = f"file://{root}/store{os.environ['WORLD_SIZE']}"
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    folder = root / str(dist.get_world_size())
    save_all(folder)
    report_refusals(folder)
    if saved:
        read_all(root / str(saved), saved)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's own threads, still ending, were once seen to abort the exit


def save_all(folder: Path) -> None:
    world = dist.get_world_size()
    planner = BalancedSavePlanner()
    save(common_state(), folder / "common", planner)
    save(common_state(), folder / "common-stock", DefaultSavePlanner())
    save(sharded_state(world), folder / "sharded", planner)
    save(sharded_state(world), folder / "sharded-stock", DefaultSavePlanner())
    if world == 4:
        save(mixed_state(), folder / "mixed", planner)
    units: tuple[Writers, ...] = ("none", "socket", "machine")
    for unit in units:
        with placed():
            save(common_state(), folder / unit, BalancedSavePlanner(unit))
    writer = FileSystemWriter(folder / "background", single_file_per_rank=False, thread_count=2)
    dcp.async_save(common_state(), storage_writer=writer, planner=BalancedSavePlanner()).result()
    alone = folder / f"alone{dist.get_rank()}"
    writer = FileSystemWriter(alone)
    dcp.save(common_state(), storage_writer=writer, planner=BalancedSavePlanner(), no_dist=True)
    whole = {"model": replicated()["model"]}
    flat = BalancedSavePlanner(flatten_state_dict=False)
    save(whole["model"], folder / "flat", flat)


def save(state: dict[str, Any], folder: Path, planner: DefaultSavePlanner) -> None:
    dcp.save(state, storage_writer=FileSystemWriter(folder), planner=planner)


@contextmanager
def placed() -> Generator[None]:
    """Two ranks to a machine; on each machine a socket for every rank."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "here", lambda: Place(f"machine {rank // 2}", (rank % 2,)))
        yield


def report_refusals(folder: Path) -> None:
    """Write down what states are answered with that no planner could share out."""
    rank = dist.get_rank()
    last = rank == dist.get_world_size() - 1
    states: dict[str, dict[str, Any]] = {
        "shape": {"x": torch.zeros(3 + last, 2)},
        "dtype": {"x": torch.zeros(3, 2, dtype=torch.float16 if last else torch.float32)},
        "dimensions": {"x": torch.zeros(3) if last else torch.zeros(3, 2)},
        "kind": {"x": 5 if last else torch.zeros(3, 2)},
        "planner": {"x": torch.zeros(3, 2)},
    }
    said = {}
    for name, state in states.items():
        stock = name == "planner" and last
        planner = DefaultSavePlanner() if stock else BalancedSavePlanner()
        try:
            save(state, folder / f"refused-{name}", planner)
        except dcp.api.CheckpointException as error:
            said[name] = str(error)
    (folder / f"refused{rank}.json").write_text(json.dumps(said))


def read_all(folder: Path, saved: int) -> None:
    """Read with stock DCP and compare bits."""
    world = dist.get_world_size()
    for name in ("common", "none", "socket", "machine", "background"):
        read_common(folder / name, saved)
    target = {**zeros(sharded_state(world)), "b.bias": torch.zeros(1)}
    dcp.load(target, checkpoint_id=folder / "sharded")
    compare(target, Net().state_dict())
    if saved == 4:
        target = {**zeros(sharded_state(world)), **zeros(expected_mixed(), Net().state_dict())}
        dcp.load(target, checkpoint_id=folder / "mixed")
        compare(target, expected_mixed())


def read_common(folder: Path, saved: int, *, no_dist: bool = False) -> None:
    mine = {f"own{rank}": private(rank) for rank in range(saved)}
    tags = {f"tag{rank}": f"of rank {rank}" for rank in range(saved)}
    whole = {**replicated(), **mine, **tags}
    target = zeros(whole)
    dcp.load(target, checkpoint_id=folder, no_dist=no_dist)
    compare(target, whole)


def zeros(value: Any, without: Any = ()) -> Any:
    """A state of the same form that holds nothing yet."""
    if isinstance(value, dict):
        return {key: zeros(one) for key, one in value.items() if key not in without}
    if isinstance(value, list):
        return [zeros(one) for one in value]
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value.detach(), memory_format=torch.contiguous_format)
    return None


def compare(found: Any, expected: Any) -> None:
    """Everything is there, bit by bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            compare(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            compare(one, other)
    elif isinstance(expected, torch.Tensor):
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        assert (whole.dtype, whole.shape) == (expected.dtype, expected.shape)
        assert torch.equal(bits(whole), bits(expected))
    else:
        assert found == expected


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of what 2, 3 and 4 ranks have saved, each read by another number of them."""
    folder = tmp_path_factory.mktemp("balance")
    launch(folder, 4, 0)
    launch(folder, 3, 4)
    launch(folder, 2, 3)
    return folder


def launch(root: Path, world: int, saved: int) -> None:
    """Run this file on some ranks."""
    (root / str(world)).mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-X", "faulthandler", __file__, str(root), str(saved)],
            env=environment | {"RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, "\n".join(errors) or error


def metadata(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def written(folder: Path) -> dict[int, Counter[str]]:
    """Bytes of every tensor by the rank that wrote them."""
    found = metadata(folder)
    result: dict[int, Counter[str]] = defaultdict(Counter)
    for index, stored in found.storage_data.items():
        rank = int(stored.relative_path.removeprefix("__").split("_")[0])
        about = found.state_dict_metadata[index.fqn]
        if isinstance(about, TensorStorageMetadata):
            size = math.prod(chunk_of(found, index).sizes) * about.properties.dtype.itemsize
            result[rank][index.fqn] += size
    return result


def widest(names: Counter[str], found: Metadata) -> int:
    """Bytes of the widest row of some tensors."""
    widths = [5056]  # the random state, which is never cut
    for name in names:
        about = found.state_dict_metadata[name]
        assert isinstance(about, TensorStorageMetadata)
        rows, size = about.size[0] if about.size else 1, math.prod(about.size)
        widths.append(size // max(1, rows) * about.properties.dtype.itemsize)
    return max(widths)


def of_model(counts: Counter[str]) -> Counter[str]:
    return Counter({key: size for key, size in counts.items() if key.startswith("model.")})


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", ["common", "background"])
def test_ranks_write_the_same_bytes_of_replicated_state(root: Path, world: int, name: str) -> None:
    found = metadata(root / str(world) / name)
    model = {rank: of_model(own) for rank, own in written(root / str(world) / name).items()}
    assert sorted(model) == list(range(world))
    total = sum(bits(one).numel() for one in replicated()["model"].values())
    loads = [one.total() for one in model.values()]
    assert sum(loads) == total
    assert max(loads) - min(loads) <= widest(sum(model.values(), Counter()), found)
    stock = written(root / str(world) / "common-stock")
    assert len({rank for rank in stock if "model.t0" in stock[rank]}) == 1


@pytest.mark.parametrize("world", [2, 3, 4])
def test_what_is_one_ranks_own_is_written_by_it(root: Path, world: int) -> None:
    for name in ("common", "none", "machine", "socket"):
        sizes = written(root / str(world) / name)
        for rank in range(world):
            own = {key: size for key, size in sizes[rank].items() if key.startswith("own")}
            assert own == {f"own{rank}": bits(private(rank)).numel()}


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("unit", ["none", "socket", "machine"])
def test_chosen_ranks_alone_write_replicated_state(root: Path, world: int, unit: Writers) -> None:
    found = written(root / str(world) / unit)
    writers = sorted(rank for rank, counts in found.items() if of_model(counts).total())
    expected = {"none": [0], "socket": list(range(world)), "machine": list(range(0, world, 2))}
    assert writers == expected[unit]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_shards_without_replicas_are_written_as_by_stock(root: Path, world: int) -> None:
    ours, stock = (metadata(root / str(world) / name) for name in ("sharded", "sharded-stock"))
    assert ours.state_dict_metadata == stock.state_dict_metadata
    assert files_of_chunks(ours) == files_of_chunks(stock)


def files_of_chunks(found: Metadata) -> dict[MetadataIndex, str]:
    """Where each chunk is, but for empty ones, which several ranks may hold."""
    return {
        index: stored.relative_path
        for index, stored in found.storage_data.items()
        if math.prod(chunk_of(found, index).sizes)
    }


def chunk_of(found: Metadata, index: MetadataIndex) -> ChunkStorageMetadata:
    about = found.state_dict_metadata[index.fqn]
    assert isinstance(about, TensorStorageMetadata)
    return next(chunk for chunk in about.chunks if chunk.offsets == index.offset)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_names_in_the_metadata_are_those_of_stock(root: Path, world: int) -> None:
    ours, stock = (metadata(root / str(world) / name) for name in ("common", "common-stock"))
    assert ours.planner_data == stock.planner_data
    assert ours.planner_data["extra.deep.0.x"] == ("extra", "deep", 0, "x")
    assert ours.state_dict_metadata.keys() == stock.state_dict_metadata.keys()
    flat = metadata(root / str(world) / "flat")
    assert flat.planner_data is None
    stored = Counter(index.fqn for index in flat.storage_data)
    assert stored.keys() == replicated()["model"].keys()
    assert max(stored.values()) > 1


def test_replicas_of_a_shard_share_it(root: Path) -> None:
    """Ranks 0 and 2 hold the one half of a 2x2 mesh, ranks 1 and 3 the other."""
    sizes = written(root / "4" / "mixed")
    for one, other in ((0, 2), (1, 3)):
        for rank in (one, other):
            assert sizes[rank]["c.weight"]
        shards = [
            sum(sizes[rank][key] for key in (*Net().state_dict(), "columns"))
            for rank in (one, other)
        ]
        assert abs(shards[0] - shards[1]) <= 10 * 4  # a row of a.weight
    whole = [sizes[rank]["everywhere"] + sizes[rank]["plain"] for rank in range(4)]
    assert max(whole) - min(whole) <= 3 * 4  # a row of everywhere
    assert sum(whole) == (50 * 3 + 21 * 2) * 4


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_rank_that_saves_alone_writes_whole_tensors(root: Path, world: int) -> None:
    for rank in range(world):
        folder = root / str(world) / f"alone{rank}"
        about = metadata(folder).state_dict_metadata["model.t0"]
        assert isinstance(about, TensorStorageMetadata)
        assert [chunk.sizes for chunk in about.chunks] == [torch.Size((257, 33))]
        target = zeros({**replicated(), f"own{rank}": private(rank)})
        dcp.load(target, checkpoint_id=folder, no_dist=True)
        compare(target, {**replicated(), f"own{rank}": private(rank)})


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_single_process_reads_what_ranks_have_written(root: Path, world: int) -> None:
    read_common(root / str(world) / "common", world, no_dist=True)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_states_that_cannot_be_shared_are_refused_on_every_rank(root: Path, world: int) -> None:
    last = world - 1
    for rank in range(world):
        said = json.loads((root / str(world) / f"refused{rank}.json").read_text())
        assert f"ranks 0 and {last} hold different tensors called x" in said["shape"]
        assert "(3, 2)" in said["shape"]
        assert "(4, 2)" in said["shape"]
        assert "torch.float16" in said["dtype"]
        assert "ranks hold different things called x" in said["dimensions"]
        assert "ranks hold different things called x" in said["kind"]
        assert f"rank {last} saves with another planner" in said["planner"]


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]), int(sys.argv[2]))
