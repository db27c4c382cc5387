"""Who attends, and what torch's own attention is told."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.spans import Span

pytest.importorskip("triton")

from core_splitfuse.attention.gpu import Plan, Room, Rotation, Spread, choose, varlen

CPU = torch.device("cpu")
SPANS = [
    Span(row=0, begin=20, end=21, table=[5, 2], prompt=9, known=21),
    Span(row=1, begin=0, end=7, table=[3], prompt=7, known=7),
]
ROTATION = Rotation(torch.ones(1, 32), torch.zeros(1, dtype=torch.int32), torch.ones(1))


class OnCuda:
    """Shapes and dtype of a tensor of a GPU that is not there."""

    is_cuda = True

    def __init__(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = shape, dtype


def chosen(monkeypatch, active, query=None, keys=None, values=None, rule=None, rotation=None):
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: active)
    query: Any = OnCuda(8, 8, 64) if query is None else query
    keys: Any = keys or OnCuda(9, 16, 2, 64)
    values: Any = values or OnCuda(9, 16, 2, 64)
    return choose(query, keys, values, rule or Rule(0.1, window=5), rotation)


def test_flash_attention_3_answers_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "FA3").backend == "varlen"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"active": None}, "FlashAttention 2 is active"),
        ({"active": "FA4"}, "FA4 is active"),
        ({"rule": Rule(0.1, softcap=3.0)}, "scores are capped"),
        ({"rule": Rule(0.1, sinks=torch.ones(8))}, "sinks"),
        ({"rotation": ROTATION}, "unrotated"),
        ({"query": OnCuda(8, 8, 64, dtype=torch.float32)}, "torch.float32"),
        ({"values": OnCuda(9, 16, 2, 32)}, "values 32"),
        ({"keys": OnCuda(9, 16, 2, 20), "values": OnCuda(9, 16, 2, 20)}, "20 dimensions"),
        ({"keys": OnCuda(9, 16, 2, 512), "values": OnCuda(9, 16, 2, 512)}, "512 dimensions"),
        ({"query": torch.zeros(8, 8, 64, dtype=torch.float16)}, "no CUDA device"),
    ],
)
def test_all_others_are_served_by_the_own_kernels(asked, reason, monkeypatch) -> None:
    choice = chosen(monkeypatch, **{"active": "FA3", **asked})
    assert choice.backend == "triton"
    assert reason in choice.reason


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of the next call of torch's function, by the names that it gives them."""
    from torch.nn.attention import varlen as theirs

    signature = inspect.signature(theirs.varlen_attn)
    found: dict[str, Any] = {}

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        found.update(signature.bind(*args, **kwargs).arguments)
        return torch.ones(found["query"].shape)

    monkeypatch.setattr(theirs, "varlen_attn", record)
    return found


@pytest.mark.parametrize(("window", "given"), [(None, (-1, 0)), (1, (0, 0)), (128, (127, 0))])
def test_what_torch_is_told(window, given, told) -> None:
    query, store = torch.randn(8, 8, 64), torch.randn(9, 16, 2, 64)
    plan = Plan.make(SPANS, 16, CPU)
    varlen.attend(query, store, store, plan, Rule(0.3, window))
    assert told["cu_seq_q"].tolist() == [0, 1, 8]
    assert told["seqused_k"].tolist() == [21, 7]
    assert told["block_table"].tolist() == [[5, 2], [3, 0]]
    assert {tensor.dtype for tensor in (told["cu_seq_q"], told["block_table"])} == {torch.int32}
    assert (told["max_q"], told["max_k"]) == (7, 21)
    assert told["cu_seq_k"] is None
    assert told["scale"] == 0.3
    assert told["window_size"] == given
    assert told["enable_gqa"] is True
    assert told["num_splits"] is None


def test_fixed_splits_turn_its_splits_off(told) -> None:
    query, store = torch.randn(8, 2, 64), torch.randn(9, 16, 2, 64)
    plan = Plan.make(SPANS, 16, CPU, spread=Spread(4, split_tokens=64))
    varlen.attend(query, store, store, plan, Rule(0.3))
    assert told["num_splits"] == 1
    assert told["enable_gqa"] is False


def test_rows_of_padding_are_zero(told) -> None:
    room = Room(16, 4, 3)
    plan = Plan(16, CPU, room=room).fill(SPANS)
    out = varlen.attend(torch.randn(16, 8, 64), *torch.randn(2, 9, 16, 2, 64), plan, Rule(0.3))
    assert torch.equal(out[:8], torch.ones(8, 8, 64))
    assert torch.equal(out[8:], torch.zeros(8, 8, 64))
    # Sizes of a graph must not follow the pass that it was captured with.
    assert (told["max_q"], told["max_k"]) == (16, 48)
    assert told["cu_seq_q"].tolist() == [0, 1, 8, 8, 8]
    plan = Plan(16, CPU, room=replace(room, decodes=True)).fill(SPANS[:1])
    assert (plan.longest_query, plan.longest_key) == (1, 48)
