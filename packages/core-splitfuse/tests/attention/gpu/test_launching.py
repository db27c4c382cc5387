"""Arguments of all launches, up to compiled code for compute capability 9.0; nothing is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.spans import Ragged, Span

triton = pytest.importorskip("triton")

from core_splitfuse.attention.gpu import Paged, Rotation, Spread, copy_blocks  # noqa: E402

CPU = torch.device("cpu")


class NoDevice:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> Any:
        return triton.compiler.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 9998  # kernels remember what they compiled for a device

    def get_current_stream(self, device: int) -> int:
        return device


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[str, tuple[int, ...]]]]:
    """Names and grids of the kernels that were compiled instead of launched."""
    launches: list[tuple[str, tuple[int, ...]]] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert all(size >= 1 for size in grid)
        assert all(size <= 65535 for size in grid[1:])
        launches.append((self.fn.__name__, tuple(grid)))
        assert run(self, *args, grid=grid, warmup=True, **kwargs).asm["cubin"]

    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    return lambda: launches


def span(row: int, begin: int, end: int) -> Span:
    table = list(range(-(-end // 16)))
    return Span(row=row, begin=begin, end=end, table=table, prompt=end, known=end)


def layer(store: Paged, rule: Rule, spans: list[Span], rotation: Rotation | None = None) -> None:
    ragged = Ragged(spans, 16, CPU)
    count = sum(map(len, spans))
    query, key, value = (torch.randn(heads, count, 64).bfloat16() for heads in (8, 2, 2))
    store.write(0, key, value, ragged)
    store.attend(0, query, ragged, rule, rotation)


def test_a_decode_and_a_chunk(compiled) -> None:
    layer(Paged(1600, 16, CPU), Rule(0.1), [span(0, 30, 31), span(1, 0, 100)])
    # 100 tokens of four heads each: four atoms of 32 tokens at most, and two key heads.
    assert compiled() == [
        ("write_kernel", (101,)),
        ("attend_kernel", (1, 2)),
        ("attend_kernel", (4, 2)),
    ]


def test_decodes_alone(compiled) -> None:
    rule = Rule(0.1, window=8, softcap=2.0, sinks=torch.ones(8))
    layer(Paged(1600, 16, CPU), rule, [span(0, 30, 31), span(1, 3, 4), span(2, 0, 1)])
    assert compiled()[1:] == [("attend_kernel", (3, 2))]


def test_splits_of_a_long_sequence(compiled) -> None:
    store = Paged(1600, 16, CPU, spread=Spread(64, least_keys=256))
    layer(store, Rule(0.1), [span(0, 1399, 1400)])
    assert compiled()[1:] == [("attend_kernel", (6, 2)), ("merge_kernel", (1, 8))]


def test_keys_that_are_turned_for_every_head(compiled) -> None:
    one = torch.zeros(1, dtype=torch.int32)
    rotation = Rotation(torch.ones(1, 32), one, torch.ones(1), torch.ones(1, 8))
    layer(Paged(1600, 16, CPU), Rule(0.1), [span(0, 0, 300)], rotation)
    assert compiled()[1:] == [("attend_kernel", (3, 8))]


def test_copies_of_blocks(compiled) -> None:
    copy_blocks(torch.zeros(4, 16, 2, 64).bfloat16(), [(0, 1), (3, 2)])
    assert compiled() == [("copy_kernel", (2, 2))]
