"""What no interpreter can show: matrix units, graphs, torch's own attention, long sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.reference import paged_attention_reference

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

from core_splitfuse.attention.gpu import (  # noqa: E402
    GraphRunner,
    Plan,
    Rotation,
    Spread,
    attend,
    copy_blocks,
    varlen,
    write,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


@dataclass
class Asked:
    begin: int
    end: int
    table: list[int] = field(default_factory=list)


MIXED = [(3000, 3001), (0, 300), (517, 518), (900, 1100), (63, 64), (1, 3)]


class Case:
    """A store of random numbers and the sequences of a pass."""

    def __init__(
        self,
        heads: int,
        key_heads: int,
        dims: tuple[int, int],
        block_size: int,
        spans: list[tuple[int, int]],
        dtype: torch.dtype,
    ) -> None:
        torch.manual_seed(0)
        self.spans = [Asked(*span) for span in spans]
        needs = [-(-span.end // block_size) for span in self.spans]
        blocks = torch.randperm(sum(needs))
        for span, part in zip(self.spans, blocks.split(needs), strict=True):
            span.table = part.tolist()
        shape = (sum(needs), block_size, key_heads)
        self.keys = torch.randn(*shape, dims[0], device="cuda").to(dtype)
        self.values = torch.randn(*shape, dims[1], device="cuda").to(dtype)
        count = sum(span.end - span.begin for span in self.spans)
        self.query = torch.randn(count, heads, dims[0], device="cuda").to(dtype)
        self.block_size = block_size

    def plan(self, spread: Spread | None = None) -> Plan:
        return Plan.make(self.spans, self.block_size, self.query.device, spread=spread)

    def excess(self, out: Tensor, plan: Plan, rule: Rule, **turned) -> float:
        """How far an output is beyond its roundings."""
        shape = plan.tables, plan.starts, plan.lengths, rule
        exact, size = (
            paged_attention_reference(self.query, self.keys, values, *shape, **turned)
            for values in (self.values, self.values.abs())
        )
        short = 0.0 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
        # Keys that are turned are rounded, which moves their scores.
        moved = 4 * short if turned else 0.0
        allowed = exact.abs() * short + size * (short + moved + 4e-6) + 1e-7
        return float(((out.double() - exact).abs() - allowed).max())


@DTYPES
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (96, 96), (24, 16)], ids=str)
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2), (16, 1), (7, 1)])
def test_mixed_passes(dtype, dims, heads, key_heads) -> None:
    case = Case(heads, key_heads, dims, 64, MIXED, dtype)
    rule = Rule(dims[0] ** -0.5)
    plan = case.plan()
    out = attend(case.query, case.keys, case.values, plan, rule)
    assert case.excess(out, plan, rule) <= 0


@DTYPES
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("spread", [None, Spread(132, split_tokens=256), Spread(1)], ids=str)
def test_windows_softcap_and_sinks(dtype, block_size, spread) -> None:
    case = Case(8, 2, (128, 128), block_size, MIXED, dtype)
    rule = Rule(0.1, 700, 20.0, torch.randn(8, device="cuda"))
    plan = case.plan(spread)
    out = attend(case.query, case.keys, case.values, plan, rule)
    assert case.excess(out, plan, rule) <= 0


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_keys_are_turned(dtype, interleaved) -> None:
    case = Case(8, 2, (128, 128), 64, MIXED, dtype)
    frequencies = 10000.0 ** -torch.linspace(0, 1, 48, device="cuda").expand(1, -1)
    lines = torch.zeros(len(MIXED), dtype=torch.int32, device="cuda")
    ratios = torch.rand(len(MIXED), 8, device="cuda") + 0.5
    rotation = Rotation(frequencies, lines, torch.ones(1, device="cuda"), ratios, interleaved)
    rule, plan = Rule(0.05), case.plan()
    out = attend(case.query, case.keys, case.values, plan, rule, rotation)
    turned = {"frequencies": frequencies.expand(len(MIXED), -1), "ratios": ratios}
    assert case.excess(out, plan, rule, **turned, interleaved=interleaved) <= 0


def test_equal_passes_give_equal_bits() -> None:
    case = Case(8, 2, (128, 128), 64, MIXED, torch.bfloat16)
    first, second = (
        attend(case.query, case.keys, case.values, case.plan(), Rule(0.1)) for _ in range(2)
    )
    assert torch.equal(first, second)


def test_fixed_splits_do_not_depend_on_neighbours() -> None:
    case = Case(8, 2, (128, 128), 64, MIXED, torch.bfloat16)
    spread = Spread(132, split_tokens=512)
    together = attend(case.query, case.keys, case.values, case.plan(spread), Rule(0.1))
    plan = Plan.make(case.spans[:1], 64, case.query.device, spread=spread)
    alone = attend(case.query[:1], case.keys, case.values, plan, Rule(0.1))
    assert torch.equal(together[:1], alone)


def test_writes_and_copies() -> None:
    keys, values = torch.zeros(2, 50, 64, 8, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
    key, value = torch.randn(2, 8, 300, 128, device="cuda").bfloat16().transpose(1, 2).unbind(0)
    slots = torch.randperm(3200, device="cuda")[:300].int()
    write(keys, values, key, value, slots)
    assert torch.equal(keys.flatten(0, 1)[slots.long()], key)
    assert torch.equal(values.flatten(0, 1)[slots.long()], value)
    copy_blocks(keys, [(3, 7), (3, 9)])
    assert torch.equal(keys[7], keys[3])
    assert torch.equal(keys[9], keys[3])


@pytest.mark.parametrize("window", [None, 700])
def test_torchs_own_attention_agrees(window: int | None) -> None:
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    try:
        activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"FlashAttention 3 is not there: {error}")
    try:
        case = Case(8, 2, (128, 128), 64, MIXED, torch.bfloat16)
        rule, plan = Rule(0.1, window), case.plan()
        out = varlen.attend(case.query, case.keys, case.values, plan, rule)
        assert case.excess(out, plan, rule) <= 0
    finally:
        restore_flash_attention_impl()


class TinyModel:
    """One layer of attention over embeddings, from ids to logits of the rows that are wanted."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table = torch.randn(500, 8, 64, device="cuda")
        self.keys, self.values = torch.zeros(2, 300, 16, 4, 64, device="cuda").unbind(0)

    def __call__(self, plan: Plan) -> Tensor:
        x = self.table[plan.ids] + plan.positions[:, None, None] / 1000
        write(self.keys, self.values, x[:, :4], x[:, 4:], plan.slots)
        out = attend(x, self.keys, self.values, plan, Rule(0.1))
        return out[plan.rows].flatten(1) @ self.table.flatten(1).T


def test_graphs_answer_as_plain_passes() -> None:
    model, plain = TinyModel(), TinyModel()
    device = torch.device("cuda", torch.cuda.current_device())
    runner = GraphRunner(model, block_size=16, device=device, sequences=16, blocks=64)
    table = [list(range(100 * i, 100 * i + 60)) for i in range(3)]
    passes = [
        [Asked(0, 500, table[0])],
        [Asked(500, 501, table[0]), Asked(0, 30, table[1])],
        *([Asked(501 + i, 502 + i, table[0]), Asked(30 + i, 31 + i, table[1])] for i in range(10)),
        [Asked(511, 512, table[0]), Asked(40, 41, table[1]), Asked(0, 1, table[2])],
    ]
    for number, spans in enumerate(passes):
        count = sum(span.end - span.begin for span in spans)
        ids = [(7 * number + i) % 500 for i in range(count)]
        rows = (torch.tensor([s.end - s.begin for s in spans]).cumsum(0) - 1).tolist()
        found = runner.run(ids, spans, rows)
        wanted = plain(Plan(16, device).fill(spans, ids, rows))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert (8, True) in runner.sizes
