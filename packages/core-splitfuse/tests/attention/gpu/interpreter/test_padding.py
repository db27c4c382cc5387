"""Padded passes: what is there computes as without padding, the rest is inert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core.errors import EngineError
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu import GraphRunner, Plan, Room, Spread, attend, write
from core_splitfuse.attention.gpu.graphs import padded

CPU = torch.device("cpu")
RULES = [Rule(0.25), Rule(0.25, window=20, sinks=torch.ones(4)), Rule(0.25, softcap=3.0)]


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=st.lists(st.sampled_from([1, 1, 2, 9]), min_size=1, max_size=4),
    begin=st.integers(0, 40),
    rule=st.sampled_from(RULES),
    spread=st.sampled_from([Spread(1), Spread(8, least_keys=16), Spread(1, split_tokens=32)]),
    more=st.integers(0, 20),
)
def test_padding_changes_nothing(counts, begin, rule, spread, more, case_of, asked) -> None:
    spans = [asked(begin + i, begin + i + count) for i, count in enumerate(counts)]
    case = case_of(4, 2, 16, 16, 16, spans)
    decodes = set(counts) == {1}
    room = Room(sum(counts) + more, len(counts) + 2, 5, decodes=decodes)
    plan = Plan(16, CPU, room=room, spread=spread).fill(spans)
    query = case.queries(room.tokens)
    query[sum(counts) :] = torch.nan
    out = attend(query, case.keys, case.values, plan, rule)
    plain = Plan.make(spans, 16, CPU, spread=spread)
    wanted = attend(query[: sum(counts)], case.keys, case.values, plain, rule)
    torch.testing.assert_close(out[: sum(counts)], wanted, rtol=0, atol=2e-6)
    assert torch.equal(out[sum(counts) :], torch.zeros_like(out[sum(counts) :]))


def test_the_largest_pass_fits_and_addresses_stay(case_of, asked) -> None:
    room = Room(8, 8, 4, decodes=True)
    plan = Plan(16, CPU, room=room, spread=Spread(4, least_keys=16))
    places: set[tuple[int, ...]] = set()
    for count in (8, 1, 5):
        spans = [asked(63 - i, 64 - i) for i in range(count)]
        case = case_of(1, 1, 16, 16, 16, spans)
        plan.fill(spans)
        query = case.queries(8)
        out = attend(query, case.keys, case.values, plan, Rule(0.25))
        wanted = attend(
            query[:count], case.keys, case.values, Plan.make(spans, 16, CPU), Rule(0.25)
        )
        torch.testing.assert_close(out[:count], wanted, rtol=0, atol=2e-6)
        plan.fill(spans)
        tensors = plan.tables, plan.starts, plan.lengths, plan.slots, plan.positions
        places.add(tuple(tensor.data_ptr() for tensor in tensors))
    assert len(places) == 1


@pytest.mark.parametrize(
    ("spans", "what"),
    [
        ([(0, 30)], "30 tokens"),
        ([(0, 1)] * 4, "4 sequences"),
        ([(70, 71)], "longest of 71"),
    ],
)
def test_what_is_too_large_is_refused(spans, what, asked) -> None:
    plan = Plan(16, CPU, room=Room(20, 3, 4))
    with pytest.raises(EngineError, match=what):
        plan.fill([asked(begin, end, [0] * 8) for begin, end in spans])


def test_chunks_do_not_fit_where_decodes_are_meant(asked) -> None:
    with pytest.raises(EngineError, match="chunks"):
        Plan(16, CPU, room=Room(20, 3, 4, decodes=True)).fill([asked(0, 2, [0])])


def test_tables_that_are_too_short_are_refused(asked) -> None:
    with pytest.raises(EngineError, match="fewer blocks"):
        Plan.make([asked(0, 17, [3])], 16, CPU)
    with pytest.raises(EngineError, match="needs sequences"):
        Plan.make([], 16, CPU)
    with pytest.raises(EngineError, match="a token at least"):
        Plan.make([asked(4, 4, [3])], 16, CPU)


def test_numbers_of_tokens_of_graphs() -> None:
    assert [padded(n) for n in (1, 8, 9, 33, 64, 65, 512, 513, 700)] == [
        8, 8, 16, 64, 64, 128, 512, 640, 768,
    ]  # fmt: skip
    assert len({padded(n) for n in range(1, 2049)}) < 30


class TinyModel:
    """One layer of attention over embeddings, from ids to logits of the rows that are wanted."""

    def __init__(self) -> None:
        self.table = torch.randn(50, 4, 16)
        self.keys, self.values = torch.zeros(2, 40, 16, 2, 16).unbind(0)
        self.calls = 0

    def __call__(self, plan: Plan) -> torch.Tensor:
        self.calls += 1
        x = self.table[plan.ids] + plan.positions[:, None, None] / 10
        write(self.keys, self.values, x[:, :2], x[:, 2:], plan.slots)
        out = attend(x, self.keys, self.values, plan, Rule(0.25))
        return (out[plan.rows].flatten(1) @ self.table.flatten(1).T).clone()


def test_a_runner_answers_as_passes_without_padding(asked) -> None:
    model, plain = TinyModel(), TinyModel()
    plain.table = model.table
    runner = GraphRunner(model, block_size=16, device=CPU, sequences=16, blocks=4, most_tokens=40)
    tables = [[3, 7, 1, 0], [4, 9, 11, 2], [20, 21, 22, 23]]
    passes = [
        [asked(0, 9, tables[0]), asked(0, 4, tables[1])],
        [asked(9, 10, tables[0]), asked(4, 5, tables[1])],
        [asked(10, 11, tables[0]), asked(5, 6, tables[1]), asked(0, 20, tables[2])],
        [asked(11, 12, tables[0])],
    ]
    for number, spans in enumerate(passes):
        count = sum(span.end - span.begin for span in spans)
        ids = [(7 * number + i) % 50 for i in range(count)]
        ends = torch.tensor([span.end - span.begin for span in spans]).cumsum(0) - 1
        rows = ends.tolist()
        assert runner.takes(count, spans, len(rows))
        plan = Plan.make(spans, 16, CPU).fill(spans, ids, rows)
        torch.testing.assert_close(runner.run(ids, spans, rows), plain(plan), rtol=0, atol=1e-4)
    assert runner.sizes == [(8, True), (16, False), (32, False)]
    assert model.calls == 4
    assert torch.equal(model.keys, plain.keys)
    runner.forget()
    assert runner.sizes == []


def test_passes_that_are_not_for_graphs(asked) -> None:
    runner = GraphRunner(
        TinyModel(), block_size=16, device=CPU, sequences=2, blocks=4, most_tokens=40
    )
    assert runner.takes(40, [asked(0, 40)], 1)
    assert not runner.takes(41, [asked(0, 41)], 1)
    assert not runner.takes(3, [asked(0, 1)] * 3, 1)
    assert not runner.takes(1, [asked(64, 65)], 1)
    assert not runner.takes(2, [asked(0, 2)], 2)
