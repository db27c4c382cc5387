"""Whole sequences are cut for ranks whose mean loss is the loss; ranks that differ all hear of it.

``on_rank`` is what the ranks run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers.loss.loss_utils import ForCausalLMLoss

from core.errors import CoreError, DataError
from core_fpdt.parallel.mesh import Peers, peers_of
from core_fpdt.parallel.sharding import shard

if TYPE_CHECKING:
    from conftest import Launch

CHUNK = 8
WORDS = 17
Batch = dict[str, Any]


def batch(rows: int = 2, length: int = 21, seed: int = 0, **more: Any) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, WORDS, (rows, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
    return {"input_ids": ids, "labels": labels, **more}


def padded() -> Batch:
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :4] = 0
    mask[1, 15:] = 0
    whole = batch(attention_mask=mask)
    whole["labels"] = whole["labels"].masked_fill(mask == 0, -100)
    return whole


def packed() -> Batch:
    positions = torch.cat([torch.arange(5), torch.arange(1), torch.arange(15)])
    return batch(position_ids=positions.expand(2, -1))


def learnt_at(first: int, last: int) -> Batch:
    whole = batch()
    outside = torch.ones(21, dtype=torch.bool)
    outside[first:last] = False
    whole["labels"] = whole["input_ids"].masked_fill(outside, -100)
    return whole


BATCHES: dict[str, Callable[[], Batch]] = {
    "plain": batch,
    "one row": lambda: batch(rows=1),
    "padded": padded,
    "packed": packed,
    "whole chunks": lambda: batch(length=24),
    "shorter than a chunk": lambda: batch(length=7),
    "shorter than the ranks": lambda: batch(rows=3, length=3),
    "labels on one rank": lambda: learnt_at(1, 2),
    "shifted before": lambda: batch(shift_labels=batch(seed=3)["labels"]),
    "with embeddings": lambda: {
        "inputs_embeds": torch.randn(2, 21, 3, generator=torch.Generator().manual_seed(1)),
        "labels": batch()["labels"],
    },
}


def on_rank(folder: Path) -> dict[str, Any]:
    world = dist.group.WORLD
    assert world is not None
    peers = peers_of(world, "sp")
    said: dict[str, Any] = {"cut": {}, "differ": {}}
    for name, make in BATCHES.items():
        whole = make()
        cut = shard(whole, CHUNK, peers)
        said["cut"][name] = {
            "lists": {n: t.tolist() for n, t in cut.items()},
            "loss": loss_of(cut, scores(whole)[:, places(cut, whole)]),
            "counted": loss_of(
                shard({**whole, "num_items_in_batch": 7}, CHUNK, peers),
                scores(whole)[:, places(cut, whole)],
            ),
        }
    for name, change in CHANGES.items():
        said["differ"][name] = refusal(change, peers)
    said["nothing to learn"] = nothing_to_learn(peers)
    said["no labels"] = sorted(shard({"input_ids": batch()["input_ids"]}, CHUNK, peers))
    one = shard(batch(rows=1, length=1), CHUNK, peers)
    said["one token"] = [one["input_ids"].shape[1], *one["fpdt_documents"][0].tolist()]
    if dist.get_world_size() == 4:
        said["mesh"] = on_a_mesh()
    return said


def scores(whole: Batch) -> Tensor:
    """Logits (B, S, V) of a model that is none."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(*whole["labels"].shape, WORDS, generator=generator)


def places(cut: Batch, whole: Batch) -> Tensor:
    """Where this rank's tokens are in the sequence; told by a tensor that is cut like all others."""
    here = torch.arange(1, 1 + whole["labels"].shape[1]).unsqueeze(0)
    world = dist.group.WORLD
    assert world is not None
    told: Tensor = shard({**whole, "place": here}, CHUNK, peers_of(world, "sp"))["place"][0]
    assert told.shape[0] == cut["attention_mask"].shape[1]
    return (told - 1).clamp_min(0)  # what was added is 0, and predicts nothing


def loss_of(cut: Batch, logits: Tensor) -> float:
    loss = ForCausalLMLoss(
        logits,
        cut["labels"],
        WORDS,
        num_items_in_batch=cut["num_items_in_batch"],
        shift_labels=cut["shift_labels"],
    )
    return float(loss)


def nothing_to_learn(peers: Peers) -> float:
    whole = learnt_at(0, 0)
    cut = shard(whole, CHUNK, peers)
    return loss_of(cut, scores(whole)[:, places(cut, whole)])


CHANGES: dict[str, Callable[[Batch], tuple[Batch, int]]] = {
    "length": lambda b: (batch(length=20), CHUNK),
    "rows": lambda b: (batch(rows=1), CHUNK),
    "chunk": lambda b: (b, CHUNK + 1),
    "tokens": lambda b: ({**b, "input_ids": b["input_ids"].flip(1)}, CHUNK),
    "labels": lambda b: ({"input_ids": b["input_ids"]}, CHUNK),
    "padding": lambda b: ({**b, "attention_mask": torch.zeros(2, 21)}, CHUNK),
    "positions": lambda b: ({**b, "position_ids": torch.arange(1, 22).unsqueeze(0)}, CHUNK),
    "count": lambda b: ({**b, "num_items_in_batch": 9}, CHUNK),
    "names": lambda b: ({**b, "use_cache": False}, CHUNK),
    "broken": lambda b: ({**b, "labels": "none"}, CHUNK),
    "small chunks": lambda b: (b, 1),
}


def refusal(change: Callable[[Batch], tuple[Batch, int]], peers: Peers) -> list[str]:
    """What a rank hears when the last one of its group brings something else."""
    whole, chunk = batch(), CHUNK
    if dist.get_rank() == dist.get_world_size() - 1:
        whole, chunk = change(whole)
    try:
        shard(whole, chunk, peers)
    except DataError as error:
        return [error.what, error.why]
    return []


def on_a_mesh() -> dict[str, Any]:
    """Two groups of two ranks, with data of their own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    peers = peers_of(mesh, "sp")
    group = mesh.get_local_rank("dp")
    whole = [batch(), learnt_at(3, 9)][group]
    cut = shard(whole, CHUNK, peers)
    here = torch.arange(21).unsqueeze(0)
    own = shard({**whole, "place": here}, CHUNK, peers)["place"][0]
    different = batch(length=19) if dist.get_rank() == 3 else whole
    try:
        shard(different, CHUNK, peers)
        heard = ""
    except DataError as error:
        heard = error.what
    try:
        peers_of(mesh, "cp")
        missing = ""
    except CoreError as error:
        missing = str(error)
    return {
        "loss": loss_of(cut, scores(whole)[:, own]),
        "heard": heard,
        "missing": missing,
        "again": shard(whole, CHUNK, peers)["input_ids"].tolist() == cut["input_ids"].tolist(),
    }


@pytest.fixture(scope="module", params=[2, 4])
def said(request: pytest.FixtureRequest, launch: Launch) -> list[dict[str, Any]]:
    """What each of some ranks found."""
    return launch(__file__, request.param)


@pytest.fixture(scope="module")
def meshed(launch: Launch) -> list[dict[str, Any]]:
    """What two groups of two ranks found."""
    return [rank["mesh"] for rank in launch(__file__, 4)]


def together(said: list[dict[str, Any]], name: str, what: str) -> Tensor:
    """A tensor of all ranks, ordered by chunks and by ranks within them, without what was added."""
    length = len(BATCHES[name]()["labels"][0])
    parts = [torch.tensor(rank["cut"][name]["lists"][what]) for rank in said]
    places = torch.cat(_places(said, name))
    return torch.cat(parts, dim=1)[:, places.argsort()][:, :length]


def _places(said: list[dict[str, Any]], name: str) -> list[Tensor]:
    """Tokens of each rank, from the definition: neighbours of a chunk, dealt out evenly."""
    world, length = len(said), len(said[0]["cut"][name]["lists"]["fpdt_documents"][0])
    own: list[list[int]] = [[] for _ in range(world)]
    for begin in range(0, length, CHUNK):
        tokens = torch.arange(begin, min(begin + CHUNK, length))
        for rank, piece in enumerate(tokens.tensor_split(world)):
            own[rank] += piece.tolist()
    return [torch.tensor(places, dtype=torch.long) for places in own]


@pytest.mark.parametrize("name", BATCHES)
def test_together_the_ranks_have_the_batch(said: list[dict[str, Any]], name: str) -> None:
    whole = BATCHES[name]()
    positions = whole.get("position_ids", torch.arange(whole["labels"].shape[1]).unsqueeze(0))
    shifted = torch.nn.functional.pad(whole["labels"], (0, 1), value=-100)[:, 1:]
    targets = whole.get("shift_labels", shifted)
    for token in ("input_ids", "inputs_embeds"):
        if token in whole:
            assert together(said, name, token).equal(whole[token])
    assert together(said, name, "shift_labels").equal(targets)
    assert together(said, name, "labels").equal(targets)
    assert together(said, name, "position_ids").equal(positions)
    assert together(said, name, "attention_mask").eq(1).all()


@pytest.mark.parametrize("name", BATCHES)
def test_every_rank_knows_all_documents(said: list[dict[str, Any]], name: str) -> None:
    whole = BATCHES[name]()
    expected = torch.zeros_like(whole["labels"])
    if name == "padded":
        expected = whole["attention_mask"] - 1
    if name == "packed":
        expected = torch.tensor([[0] * 5 + [1] + [2] * 15] * 2)
    last = whole["labels"].shape[1] % CHUNK
    added = len(said) - last if 0 < last < len(said) else 0
    expected = torch.nn.functional.pad(expected, (0, added), value=-1)
    for rank in said:
        assert rank["cut"][name]["lists"]["fpdt_documents"] == expected.tolist()


@pytest.mark.parametrize("name", BATCHES)
def test_the_mean_over_ranks_is_the_loss(said: list[dict[str, Any]], name: str) -> None:
    whole = BATCHES[name]()
    more = {"shift_labels": whole["shift_labels"]} if "shift_labels" in whole else {}
    expected = float(ForCausalLMLoss(scores(whole), whole["labels"], WORDS, **more))
    found = sum(rank["cut"][name]["loss"] for rank in said) / len(said)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", BATCHES)
def test_a_count_of_the_caller_is_kept(said: list[dict[str, Any]], name: str) -> None:
    whole = BATCHES[name]()
    more = {"shift_labels": whole["shift_labels"]} if "shift_labels" in whole else {}
    logits = scores(whole)
    expected = ForCausalLMLoss(logits, whole["labels"], WORDS, num_items_in_batch=7, **more)
    found = sum(rank["cut"][name]["counted"] for rank in said) / len(said)
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_ranks_without_labels_add_nothing(said: list[dict[str, Any]]) -> None:
    losses = [rank["cut"]["labels on one rank"]["loss"] for rank in said]
    assert losses[0] > 0
    assert losses[1:] == [0.0] * (len(said) - 1)
    assert [rank["nothing to learn"] for rank in said] == [0.0] * len(said)


def test_without_labels_nothing_is_added(said: list[dict[str, Any]]) -> None:
    expected = ["attention_mask", "fpdt_documents", "input_ids", "position_ids"]
    assert [rank["no labels"] for rank in said] == [expected] * len(said)


@pytest.mark.parametrize("name", BATCHES)
def test_every_rank_has_tokens_of_every_chunk(said: list[dict[str, Any]], name: str) -> None:
    sizes = [len(rank["cut"][name]["lists"]["attention_mask"][0]) for rank in said]
    assert min(sizes) >= len(range(0, BATCHES[name]()["labels"].shape[1], CHUNK))
    assert max(sizes) - min(sizes) <= len(range(0, BATCHES[name]()["labels"].shape[1], CHUNK))


def test_a_single_token_is_filled_up(said: list[dict[str, Any]]) -> None:
    expected = [1, 0] + [-1] * (len(said) - 1)
    assert [rank["one token"] for rank in said] == [expected] * len(said)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "length",
            "tokens 21 and 20, other inputs, other labels, other positions,"
            " other documents or padding",
        ),
        ("rows", "rows 2 and 1, other inputs, other labels, other documents or padding"),
        ("chunk", "chunk tokens 8 and 9"),
        ("tokens", "other inputs"),
        ("labels", "other labels"),
        ("padding", "other documents or padding"),
        ("positions", "other positions"),
        ("count", "other num_items_in_batch"),
        ("names", "other inputs"),
    ],
)
def test_ranks_that_differ_all_hear_it(said: list[dict[str, Any]], name: str, why: str) -> None:
    what = f"ranks 0 and {len(said) - 1} share sequences, but differ"
    assert [rank["differ"][name] for rank in said] == [[what, why]] * len(said)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("broken", "labels does not fit to 2 sequences of 21 tokens"),
        ("small chunks", "{} ranks cannot share chunks of 1 tokens"),
    ],
)
def test_a_batch_that_one_cannot_read_stops_all(
    said: list[dict[str, Any]], name: str, what: str
) -> None:
    heard = [rank["differ"][name][0] for rank in said]
    assert heard == [f"rank {len(said) - 1} has failed"] * (len(said) - 1) + [
        what.format(len(said))
    ]


def test_groups_with_other_data_count_the_tokens_of_all(meshed: list[dict[str, Any]]) -> None:
    sums, learnt = 0.0, 0
    for whole in (batch(), learnt_at(3, 9)):
        shifted = whole["labels"][:, 1:]
        count = int((shifted != -100).sum())
        sums += count * float(ForCausalLMLoss(scores(whole), whole["labels"], WORDS))
        learnt += count
    found = sum(rank["loss"] for rank in meshed) / 4
    assert found == pytest.approx(sums / learnt, rel=1e-6)


def test_all_groups_stop_when_one_cannot_go_on(meshed: list[dict[str, Any]]) -> None:
    heard = "ranks 2 and 3 share sequences, but differ"
    assert [rank["heard"] for rank in meshed] == [heard] * 4
    assert all(rank["again"] for rank in meshed)


def test_a_mesh_without_the_dimension_is_refused(meshed: list[dict[str, Any]]) -> None:
    told = "the mesh has no dimension 'cp': its dimensions are: dp, sp"
    assert all(told in rank["missing"] for rank in meshed)
