"""A sequence gets the same bits in any company, in chunks of any size, and with any threads."""

from __future__ import annotations

import threading

import pytest
import torch

from core_splitfuse.attention.dense import Rule

LENGTHS = [(300, 1), (4100, 1), (40, 7), (0, 30), (2100, 2), (0, 1)]
CASES = [(dtype, rule) for dtype in (torch.float32, torch.bfloat16) for rule in (
    Rule(0.2), Rule(0.2, window=100), Rule(0.2, softcap=20.0, sinks=torch.ones(6)),
)]  # fmt: skip


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "rule"), CASES)
def test_alone_or_together_the_bits_are_the_same(native, world, dtype, rule):
    case = world(LENGTHS, heads=6, width=24, value_width=20, dtype=dtype)
    together = case.attend(rule)
    for index, wanted in enumerate(together):
        [alone] = case.attend(rule, [index])
        assert torch.equal(alone, wanted)
    turned = case.attend(rule, [5, 3, 1])
    assert all(torch.equal(turned[i], together[j]) for i, j in enumerate((5, 3, 1)))


@pytest.mark.parametrize(("dtype", "rule"), CASES)
def test_any_number_of_threads_gives_the_same_bits(native, world, threads, dtype, rule):
    case = world(LENGTHS, heads=6, width=24, value_width=20, dtype=dtype)
    threads(1)
    one = case.attend(rule)
    for count in (2, 3, 8):
        threads(count)
        assert all(map(torch.equal, case.attend(rule), one))


@pytest.mark.parametrize(("dtype", "rule"), CASES)
def test_any_chunk_gives_the_same_bits(native, world, dtype, rule):
    short = world([(0, 300)], heads=6, width=24, value_width=20, dtype=dtype)
    [wanted] = short.attend(rule)
    for cut in (1, 127, 128, 299):
        short.lengths = [(cut, 300 - cut)]
        assert torch.equal(short.attend(rule)[0], wanted[cut:])
    # The tokens of a chunk may see several parts where those before it see one.
    long = world([(2030, 60)], heads=6, width=24, value_width=20, dtype=dtype)
    [wanted] = long.attend(rule)
    for cut in (2047, 2048, 2089):
        long.lengths = [(cut, 2090 - cut)]
        assert torch.equal(long.attend(rule)[0], wanted[cut - 2030 :])


def test_blocks_do_not_matter(native, world):
    case = world(LENGTHS, heads=6)
    rule = Rule(0.2)
    wanted = case.attend(rule)
    case.tables = [[case.blocks - 1 - block for block in table] for table in case.tables]
    assert all(map(torch.equal, case.attend(rule), wanted))


def test_callers_in_several_threads_do_not_disturb_each_other(native, world, threads):
    threads(3)
    case = world(LENGTHS, heads=6)
    rule = Rule(0.2)
    wanted = case.attend(rule)
    same: list[bool] = []

    def call() -> None:
        same.extend(all(map(torch.equal, case.attend(rule), wanted)) for _ in range(3))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert same == [True] * 9
