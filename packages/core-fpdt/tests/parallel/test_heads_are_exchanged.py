"""Tokens are exchanged for heads and back on real ranks; gradients of shared keys add up.

``on_rank`` is what the ranks run: attention with the heads of each rank, forwards and backwards, held
against attention with all heads in one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import ModelError
from core.softmax import attend
from core_fpdt.kernels.contract import Gradients, Scores
from core_fpdt.layer.step import Inputs
from core_fpdt.parallel.placement import Placement
from core_fpdt.parallel.shared import Shared

if TYPE_CHECKING:
    from conftest import Launch

FLOAT64 = 1e-14


@dataclass(frozen=True)
class Case:
    """Heads of queries and keys, widths of keys and values, length, chunk."""

    heads: int
    keys: int
    length: int = 22
    chunk: int = 8
    width: int = 4
    values: int = 4
    rows: int = 2


CASES = {
    "even": Case(8, 8),
    "grouped": Case(8, 4),
    "one head of keys": Case(4, 1),
    "fewer heads of keys than ranks": Case(8, 2),
    "uneven heads": Case(5, 5),
    "uneven groups": Case(6, 2),
    "groups across ranks": Case(15, 3),
    "values of another width": Case(8, 4, values=6),
    "a chunk smaller than the ranks": Case(4, 4, length=9, chunk=8),
    "a sequence smaller than the ranks": Case(4, 2, length=1),
    "one row": Case(4, 2, rows=1),
}


def on_rank(folder: Path) -> dict[str, Any]:
    said: dict[str, Any] = {name: compare(case) for name, case in CASES.items()}
    said["exchanges"] = count_exchanges()
    said["refused"] = refused()
    said["mixed"] = mixed()
    said["sinks"] = sinks()
    return said


def whole_tensors(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(case.heads * 100 + case.keys)

    def draw(heads: int, width: int) -> Tensor:
        shape = case.rows, heads, case.length, width
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    widths = (case.heads, case.width), (case.keys, case.width), (case.keys, case.values)
    return [*(draw(*one) for one in widths), draw(case.heads, case.values)]


def make(case: Case) -> tuple[Placement, Shared, Tensor]:
    """Placement, exchange and this rank's tokens."""
    placement = Placement.regular(case.length, case.chunk, dist.get_world_size())
    group = dist.group.WORLD
    assert group is not None
    return placement, Shared(placement, group), placement.indices(dist.get_rank())


def compare(case: Case) -> dict[str, float]:
    """Attention of each chunk within itself: largest differences by what is compared."""
    query, key, value, grad = whole_tensors(case)
    placement, shared, own = make(case)
    worst = dict.fromkeys(("output", "query", "key", "value"), 0.0)
    for chunk in range(placement.chunks):
        tokens = slice(placement.edges[chunk], placement.edges[chunk + 1])
        expected = plainly(*(t[:, :, tokens] for t in (query, key, value, grad)))
        local = slice(shared.local_edges[chunk], shared.local_edges[chunk + 1])
        mine = own[local]
        inputs = Inputs(query[:, :, mine], key[:, :, mine], value[:, :, mine], Scores(1.0), None)
        heads = shared.to_heads(chunk, inputs)
        dout = shared.heads_of(chunk, grad[:, :, mine], heads)
        found = plainly(heads.query, heads.key, heads.value, dout)
        output = shared.to_sequence(chunk, found[0])
        gradients = shared.gradients_to_sequence(chunk, Gradients(*found[1:]))
        at = mine - placement.edges[chunk]
        for name, one, two in zip(worst, (output, *gradients), expected, strict=True):
            assert one.shape == two[:, :, at].shape, name
            if one.numel():
                worst[name] = max(worst[name], float((one - two[:, :, at]).abs().max()))
    return worst


def plainly(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of attention."""
    inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = attend(*inputs).output
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def count_exchanges() -> int:
    """Calls of an exchange for queries, keys and values together."""
    calls: list[int] = []
    exchange = dist.all_to_all_single
    case = CASES["grouped"]
    query, key, value, _ = whole_tensors(case)
    _, shared, own = make(case)
    mine = own[: shared.local_edges[1]]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return exchange(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted)
        inputs = Inputs(query[:, :, mine], key[:, :, mine], value[:, :, mine], Scores(1.0), None)
        shared.to_heads(0, inputs)
    return len(calls)


def refused() -> str:
    case = Case(dist.get_world_size() - 1, 1)
    query, key, value, _ = whole_tensors(case)
    _, shared, _ = make(case)
    try:
        shared.to_heads(0, Inputs(query, key, value, Scores(1.0), None))
    except ModelError as error:
        return error.what
    return "nothing"


def mixed() -> list[str]:
    """Gradients in several dtypes: each comes back in its own, and what is added is added in float32."""
    case = Case(dist.get_world_size(), 1, length=8)
    query, key, value, _ = whole_tensors(case, torch.bfloat16)
    _, shared, own = make(case)
    mine = own[: shared.local_edges[1]]
    inputs = Inputs(query[:, :, mine], key[:, :, mine], value[:, :, mine], Scores(1.0), None)
    heads = shared.to_heads(0, inputs)
    # 256 + 1 is 256 in bfloat16, and 256 + 4 * 1 is not.
    ones = torch.full_like(heads.value, 256.0 if dist.get_rank() == 0 else 1.0)
    found = shared.gradients_to_sequence(0, Gradients(heads.query, heads.key.float(), ones))
    total = 256.0 + dist.get_world_size() - 1
    assert found.value.eq(torch.tensor(total).bfloat16()).all(), found.value
    assert found.query.equal(inputs.query)
    return [str(tensor.dtype) for tensor in (*heads[:3], *found)]


def sinks() -> bool:
    """Each rank has the sinks of its own heads, and their gradients add up to those of all."""
    case = CASES["uneven heads"]
    query, key, value, _ = whole_tensors(case)
    _, shared, own = make(case)
    mine = own[: shared.local_edges[1]]
    whole = torch.arange(case.heads, dtype=torch.float64)
    inputs = Inputs(query[:, :, mine], key[:, :, mine], value[:, :, mine], Scores(1.0), whole)
    heads = shared.to_heads(0, inputs)
    assert heads.sinks is not None
    assert len(heads.sinks) == heads.query.shape[1]
    total = shared.sinks_of_all(heads.sinks, case.heads)
    dist.all_reduce(total)
    return total.equal(whole)


@pytest.fixture(scope="module", params=[2, 4])
def said(request: pytest.FixtureRequest, launch: Launch) -> list[dict[str, Any]]:
    """What each of some ranks found."""
    return launch(__file__, request.param)


@pytest.mark.parametrize("name", CASES)
def test_attention_and_its_gradients_are_those_of_one_rank(
    said: list[dict[str, Any]], name: str
) -> None:
    for rank in said:
        assert max(rank[name].values()) < FLOAT64, rank[name]


def test_queries_keys_and_values_travel_together(said: list[dict[str, Any]]) -> None:
    assert [rank["exchanges"] for rank in said] == [1] * len(said)


def test_every_rank_refuses_a_layer_with_too_few_heads(said: list[dict[str, Any]]) -> None:
    world = len(said)
    expected = f"{world} ranks cannot share the {world - 1} attention heads of a layer"
    assert [rank["refused"] for rank in said] == [expected] * world


def test_dtypes_come_back(said: list[dict[str, Any]]) -> None:
    half, full = "torch.bfloat16", "torch.float32"
    assert [rank["mixed"] for rank in said] == [[half, half, half, half, full, half]] * len(said)


def test_sinks_belong_to_heads(said: list[dict[str, Any]]) -> None:
    assert all(rank["sinks"] for rank in said)
