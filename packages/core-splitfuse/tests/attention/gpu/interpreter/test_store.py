"""The paged store answers as the slabs do, through the same interface."""

from __future__ import annotations

import pytest
import torch

from core.errors import EngineError
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu import Paged, Plan, Room
from core_splitfuse.attention.slabs import Slabs
from core_splitfuse.attention.spans import Ragged, Span

CPU = torch.device("cpu")
RULE = Rule(0.25, window=25)


def span(row: int, begin: int, end: int, table: list[int]) -> Span:
    return Span(row=row, begin=begin, end=end, table=table, prompt=end, known=end)


def stores() -> tuple[Paged, Slabs]:
    return Paged(12 * 16, 16, CPU), Slabs(12 * 16, 16)


def test_passes_agree_with_the_slabs() -> None:
    paged, slabs = stores()
    tables = [1, 5, 3], [4, 2]
    for first, second in (((0, 20), (0, 3)), ((20, 21), (3, 18)), ((21, 22), (18, 19))):
        spans = [span(0, *first, tables[0]), span(first[1] - first[0], *second, tables[1])]
        ragged = Ragged(spans, 16, CPU)
        count = sum(map(len, spans))
        for layer in (0, 1):
            query, key, value = (torch.randn(h, count, d) for h, d in ((4, 24), (2, 24), (2, 16)))
            for store in (paged, slabs):
                store.write(layer, key, value, ragged)
            out, wanted = (store.attend(layer, query, ragged, RULE) for store in (paged, slabs))
            torch.testing.assert_close(out, wanted, rtol=0, atol=2e-6)
    assert paged.bytes_per_token == slabs.bytes_per_token


def test_reading_and_copying() -> None:
    paged, slabs = stores()
    whole = span(0, 0, 40, [7, 8, 2])
    ragged = Ragged([whole], 16, CPU)
    key, value = torch.randn(2, 40, 24), torch.randn(2, 40, 16)
    for store in (paged, slabs):
        store.write(0, key, value, ragged)
        store.copy([(8, 1), (2, 0)])
    twin = span(0, 0, 40, [7, 1, 0])
    for first in (0, 5, 16, 30):
        for seen in (whole, twin):
            found, wanted = paged.read(0, seen, first), slabs.read(0, seen, first)
            assert torch.equal(found[0], wanted[0])
            assert torch.equal(found[1], wanted[1])


def test_a_plan_of_somebody_else_is_used() -> None:
    paged, slabs = stores()
    spans = [span(0, 0, 5, [3])]
    ragged = Ragged(spans, 16, CPU)
    plan = Plan(16, CPU, room=Room(8, 4, 2)).fill(spans)
    query, key, value = (torch.randn(h, 8, 16) for h in (4, 2, 2))
    with paged.planned(plan):
        paged.write(0, key, value, None)
        out = paged.attend(0, query, None, RULE)
    slabs.write(0, key[:, :5], value[:, :5], ragged)
    wanted = slabs.attend(0, query[:, :5], ragged, RULE)
    torch.testing.assert_close(out[:5], wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [1, 8, 24])
def test_blocks_that_kernels_cannot_read_are_refused(size: int) -> None:
    with pytest.raises(EngineError, match=f"blocks of {size} tokens"):
        Paged(240, size, CPU)
