from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from core.errors import SettingsError
from core_splitfuse.attention.cpu import KERNELS
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.slabs import Slabs
from core_splitfuse.attention.spans import Ragged, Span

CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORE_SPLITFUSE_CACHE", str(tmp_path_factory.mktemp("libraries")))
        yield


@pytest.fixture(params=KERNELS.names)
def forced(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every variant that works here, in turn."""
    try:
        KERNELS.force(request.param)
    except SettingsError as error:
        pytest.skip(str(error))
    yield request.param
    KERNELS.force(None)


@pytest.fixture(params=[name for name in KERNELS.names if name != "torch"])
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every variant in C that works here, in turn."""
    try:
        KERNELS.force(request.param)
    except SettingsError as error:
        pytest.skip(str(error))
    yield request.param
    KERNELS.force(None)


@dataclass
class World:
    """Sequences whose keys and values are known, in the blocks of a store.

    Args:
        lengths: (tokens in the store, new tokens) of every sequence.
        heads: of queries.
        kv_heads: of keys.
        width: of queries and keys.
        value_width: of values.
        dtype: of all of it.
        block: tokens in a block.
    """

    lengths: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    value_width: int = 16
    dtype: torch.dtype = torch.float32
    block: int = 16
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def rows(heads: int, width: int) -> list[Tensor]:
            return [
                (torch.randn(heads, old + new, width, generator=random) * self.scale).to(self.dtype)
                for old, new in self.lengths
            ]

        self.queries = rows(self.heads, self.width)
        self.keys = rows(self.kv_heads, self.width)
        self.values = rows(self.kv_heads, self.value_width)
        self.blocks = sum(-(-(old + new) // self.block) for old, new in self.lengths)
        order = torch.randperm(self.blocks, generator=random).tolist()
        self.tables: list[list[int]] = []
        for old, new in self.lengths:
            count = -(-(old + new) // self.block)
            self.tables.append(order[:count])
            del order[:count]

    def attend(self, rule: Rule, members: list[int] | None = None) -> list[Tensor]:
        """(T, H, Dv) of the new tokens of some sequences, computed in one pass."""
        members = list(range(len(self.lengths))) if members is None else members
        slabs = Slabs(self.blocks * self.block, self.block)
        before = [(index, 0, self.lengths[index][0]) for index in members if self.lengths[index][0]]
        now = [(i, self.lengths[i][0], sum(self.lengths[i])) for i in members]
        if before:
            self._write(slabs, before)
        ragged = self._write(slabs, now)
        query = torch.cat([self.queries[i][:, a:b] for i, a, b in now], dim=1)
        out = slabs.attend(0, query, ragged, rule)
        return list(out.split([b - a for _, a, b in now]))

    def exact(self, rule: Rule) -> list[Tensor]:
        """The same in float64."""
        return [self._exact(index, rule) for index in range(len(self.lengths))]

    def _write(self, slabs: Slabs, parts: list[tuple[int, int, int]]) -> Ragged:
        spans: list[Span] = []
        row = 0
        for index, begin, end in parts:
            spans.append(Span(row, begin, end, self.tables[index], prompt=end, known=end))
            row += end - begin
        ragged = Ragged(spans, self.block, CPU)
        key, value = (
            torch.cat([of[index][:, begin:end] for index, begin, end in parts], dim=1)
            for of in (self.keys, self.values)
        )
        slabs.write(0, key, value, ragged)
        return ragged

    def _exact(self, index: int, rule: Rule) -> Tensor:
        old, new = self.lengths[index]
        group = self.heads // self.kv_heads
        query = self.queries[index][:, old:].double()
        key = self.keys[index].double().repeat_interleave(group, 0)
        value = self.values[index].double().repeat_interleave(group, 0)
        scores = query @ key.mT * rule.scaling
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        distance = torch.arange(old, old + new)[:, None] - torch.arange(old + new)
        hidden = distance < 0
        if rule.window is not None:
            hidden |= distance >= rule.window
        scores = scores.masked_fill(hidden, -torch.inf)
        if rule.sinks is not None:
            sinks = rule.sinks.double().view(-1, 1, 1).expand(-1, new, 1)
            scores = torch.cat([scores, sinks], -1)
        weights = scores.softmax(-1)[..., : old + new]
        return (weights @ value).transpose(0, 1)


@pytest.fixture(scope="session")
def world() -> type[World]:
    return World


Near = Callable[[list[Tensor], list[Tensor]], None]


@pytest.fixture(scope="session")
def near() -> Near:
    """One rounding to the dtype, and 2e-6 of the largest value, around the exact result."""

    def check(found: list[Tensor], exact: list[Tensor]) -> None:
        for one, wanted in zip(found, exact, strict=True):
            rounding = 0 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps / 2
            bound = rounding * wanted.abs() + 2e-6 * wanted.abs().max()
            assert one.shape == wanted.shape
            assert bool(((one.double() - wanted).abs() <= bound).all())

    return check
