from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from core_fp6.kernels import cpu
from core_fp6.weights.numbers import E2M3
from core_fp6.weights.packed import Packed, quantize
from core_fp6.weights.scaling import Scheme

CASES = [(tokens, dtype) for tokens in (1, 7, 40) for dtype in (torch.bfloat16, torch.float32)]


@pytest.fixture
def weight() -> Packed:
    torch.manual_seed(1)
    return quantize(torch.randn(700, 1000), Scheme(E2M3, 128), layout="execution")


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()

    def call(count: int, work: Callable[[], Tensor]) -> Tensor:
        torch.set_num_threads(count)
        return work()

    yield call
    torch.set_num_threads(before)


@pytest.mark.parametrize(("tokens", "dtype"), CASES)
def test_any_number_of_threads_gives_the_same_bits(forced, weight, with_threads, tokens, dtype):
    if forced == "eager":
        pytest.skip("torch adds up in an order of its own")
    x = torch.randn(tokens, 1000).to(dtype)
    one = with_threads(1, lambda: cpu.linear(x, weight))
    for count in (2, 3, 8):
        assert torch.equal(with_threads(count, lambda: cpu.linear(x, weight)), one)


def test_helpers_treat_tiny_numbers_as_the_caller_does(forced, with_threads):
    if forced == "eager":
        pytest.skip("torch's threads keep settings of their own")
    tiny = torch.full((640, 256), 1e-38)
    weight = quantize(tiny, Scheme(E2M3, 0), layout="execution")
    x = torch.full((1, 256), 1e-3)
    for flush in (True, False):
        torch.set_flush_denormal(flush)
        try:
            one = with_threads(1, lambda: cpu.linear(x, weight))
            many = [with_threads(4, lambda: cpu.linear(x, weight)) for _ in range(20)]
        finally:
            torch.set_flush_denormal(False)
        assert bool((one == 0).all()) == flush
        assert all(torch.equal(each, one) for each in many)


def test_callers_in_several_threads_do_not_disturb_each_other(forced, weight, with_threads):
    inputs = [torch.randn(tokens, 1000).to(dtype) for tokens, dtype in CASES]
    wanted = [with_threads(3, lambda: cpu.linear(x, weight)) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(len(inputs))

    def call(index: int) -> None:
        start.wait()
        results = [cpu.linear(inputs[index], weight) for _ in range(10)]
        wrong.extend(index for result in results if not torch.equal(result, wanted[index]))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_computes_too(weight, with_threads):
    if cpu.variant().name == "eager":
        pytest.skip("torch's own threads do not survive a fork")
    x = torch.randn(3, 1000).bfloat16()
    wanted = with_threads(3, lambda: cpu.linear(x, weight))

    def child() -> None:
        raise SystemExit(0 if torch.equal(cpu.linear(x, weight), wanted) else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0
    assert torch.equal(cpu.linear(x, weight), wanted)
