from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu import Plan
from core_splitfuse.attention.reference import paged_attention_reference

# Only test_interpreter.py starts pytest so that the kernels are interpreted.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@dataclass
class Asked:
    """A sequence of a pass."""

    begin: int
    end: int
    table: list[int] = field(default_factory=list)


@dataclass
class Case:
    """A store that holds some sequences, in blocks that are shuffled, and nothing else.

    Slots that no token has are no numbers: whoever reads one is found out.
    """

    heads: int
    key_heads: int
    dim: int
    value_dim: int
    block_size: int
    spans: Sequence[Asked]
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        size = self.block_size
        needs = [-(-span.end // size) for span in self.spans]
        blocks = torch.randperm(sum(needs) + 2)
        lines = (len(blocks), size, self.key_heads)
        self.keys = torch.full((*lines, self.dim), torch.nan, dtype=self.dtype)
        self.values = torch.full((*lines, self.value_dim), torch.nan, dtype=self.dtype)
        for span, part in zip(self.spans, blocks[: sum(needs)].split(needs), strict=True):
            span.table = part.tolist()
            at = torch.arange(span.end)
            block = part[at // size]
            self.keys[block, at % size] = self._random(span.end, self.key_heads, self.dim)
            self.values[block, at % size] = self._random(span.end, self.key_heads, self.value_dim)

    def queries(self, tokens: int | None = None) -> Tensor:
        """Queries of the packed row, with gaps as the models have them."""
        count = sum(span.end - span.begin for span in self.spans)
        made = self._random(self.heads, tokens or count, self.dim).transpose(0, 1)
        assert made.shape[1] == self.heads
        return made

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def case_of() -> type[Case]:
    return Case


@pytest.fixture
def asked() -> type[Asked]:
    return Asked


@pytest.fixture
def assert_exact():
    """Few roundings of float32 are allowed; of shorter numbers that of weights and of the output."""

    def check(out: Tensor, query: Tensor, case: Case, plan: Plan, rule: Rule, **turned) -> None:
        shape = plan.tables, plan.starts, plan.lengths, rule
        exact, size = (
            paged_attention_reference(query, case.keys, values, *shape, **turned)
            for values in (case.values, case.values.abs())
        )
        assert out.shape == exact.shape
        assert out.dtype == case.dtype
        short = 0.0 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps / 2
        allowed = exact.abs() * short + size * (short + 3e-6) + 1e-7
        worst = float(((out.double() - exact).abs() - allowed).max())
        assert worst <= 0, f"{worst} beyond what rounding explains"

    return check
