"""What a plan computes is what can be computed by hand, and what was published."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from core_fpdt.planning import SHAPES, fitted, plan
from core_fpdt.planning.flops import attention, executed_flops, logged_flops, model_flops, pairs
from core_fpdt.planning.hardware import GIB, Hardware, hardware
from core_fpdt.planning.job import Job
from core_fpdt.planning.memory import kept_per_token, memory
from core_fpdt.planning.timing import smallest_chunk, times
from core_fpdt.settings import FPDTSettings

KIB, M = 1024, 2**20
LLAMA = SHAPES["llama-3-8b"]
MHA, G8 = replace(LLAMA, key_heads=32), replace(LLAMA, key_heads=4)


def job(**fields: object) -> Job:
    given: dict[str, object] = {"shape": LLAMA, "hardware": hardware("a100"), "sequence": M}
    return Job(**(given | fields))  # type: ignore[arg-type]


def settings(**fields: object) -> FPDTSettings:
    return FPDTSettings(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "output", "kib"),
    [(False, 0.0, 256), (False, 1.0, 516), (True, 1.0, 644), (False, 0.5, 386)],
)
def test_bytes_that_a_token_of_an_8b_model_leaves(keys: bool, output: float, kib: int) -> None:
    made = job(settings=settings(keep_keys=keys, keep_output=output))
    assert kept_per_token(made) * LLAMA.layers == kib * KIB
    host = memory(made).host
    kept = sum(host.get(part, 0) for part in ("layer inputs", "attention outputs"))
    assert kept + (host["keys and values"] if keys else 0) == kib * KIB * M


def test_a_group_of_ranks_divides_what_is_kept() -> None:
    alone, four = (memory(job(gpus=n)).host_bytes for n in (1, 4))
    assert four * 4 == alone
    # 16 ranks share 8 heads of keys: every one of them keeps a whole head.
    sixteen = memory(job(gpus=16)).host
    assert sixteen["keys and values"] * 8 == memory(job()).host["keys and values"]
    assert sixteen["layer inputs"] * 16 == memory(job()).host["layer inputs"]


def machine(rate: float, link: float) -> Hardware:
    """Attention at one rate in both directions."""
    return hardware("a100").changed(
        flops=rate, forward=1.0, backward=1.0, matmul=1.0, link=link, sharing=1
    )


A100, SHARED, H200 = machine(170e12, 25e9), machine(170e12, 6e9), machine(500e12, 50e9)


@pytest.mark.parametrize(
    ("device", "forward", "key", "query"),
    [
        (A100, (6.8e3, 1.7e3, 0.85e3), 9.5e3, (13.6e3, 3.4e3, 1.7e3)),
        (SHARED, (27e3, 7e3, 3.4e3), 38e3, (54e3, 14e3, 7e3)),
        (H200, (10e3, 2.5e3, 1.25e3), 14e3, (20e3, 5e3, 2.5e3)),
    ],
)
def test_the_chunk_that_hides_its_transfers(
    device: Hardware,
    forward: tuple[float, ...],
    key: float,
    query: tuple[float, ...],
) -> None:
    for shape, ahead, back in zip((MHA, LLAMA, G8), forward, query, strict=True):
        for order, wanted in (("query", back), ("key", key)):
            made = job(shape=shape, hardware=device, settings=settings(order=order))
            assert smallest_chunk(made, backward=False) == pytest.approx(ahead, rel=0.06)
            assert smallest_chunk(made, backward=True) == pytest.approx(wanted, rel=0.06)


def test_the_order_moves_less() -> None:
    assert job(shape=LLAMA).order == "query"
    assert job(shape=MHA).order == "key"
    assert job(shape=MHA, settings=settings(offload="none")).order == "query"
    assert job(shape=LLAMA, settings=settings(order="key")).order == "key"


@pytest.mark.parametrize("window", [0, 1, 5, 20, 30])
def test_pairs_are_counted(window: int) -> None:
    tokens = 20
    counted = sum(1 for q in range(tokens) for k in range(q + 1) if not window or q - k < window)
    assert pairs(tokens, window) == counted


def test_flops_of_an_8b_model() -> None:
    # 7 S^2 * 4096 a layer, scores made anew once: 3.2e16 at 1M tokens.
    attended = 3.5 * attention(LLAMA, M) / 32
    assert attended == pytest.approx(7 * M**2 * 4096, rel=1e-5)
    assert attended == pytest.approx(3.2e16, rel=0.02)
    # Only the products with weights are left at short sequences: 6 a parameter and token.
    in_products = LLAMA.parameters - LLAMA.head_parameters  # the embedding is looked up
    assert model_flops(LLAMA, 4) == pytest.approx(6 * in_products * 4, rel=1e-3)
    # The log of Megatron-DeepSpeed counts 8/3 of it at long ones.
    assert logged_flops(LLAMA, 2**30) / model_flops(LLAMA, 2**30) == pytest.approx(8 / 3, rel=1e-3)


@pytest.mark.parametrize(("kept", "factor"), [(1.0, 7), (0.0, 9), (0.5, 7.5), (0.25, 8.125)])
def test_attention_that_is_computed_again(kept: float, factor: float) -> None:
    """A share f kept at the end leaves 7 + 2 (1 - f)^2 squares of the sequence."""
    far = 2**30
    made = job(sequence=far, settings=settings(keep_output=kept))
    square = float(far) ** 2 * 4096 * 32
    assert executed_flops(made) / square == pytest.approx(factor, rel=2e-3)


def test_phases_add_up_and_wait_for_the_longest() -> None:
    slow = hardware("a100").changed(link=1e9)
    found = times(job(hardware=slow, gpus=4))
    assert found.step == pytest.approx(sum(phase.seconds for phase in found.phases))
    forward = next(phase for phase in found.phases if phase.name == "forward")
    assert forward.bound == "link"
    assert forward.seconds >= forward.transfer + forward.exchange
    near = times(job(hardware=slow, gpus=4, settings=settings(offload="none")))
    assert all(phase.transfer == 0 for phase in near.phases)
    assert near.step < found.step


def test_windows_skip_pairs_and_transfers() -> None:
    windowed = replace(LLAMA, windows=(4096,) * 32)
    full, few = (times(job(shape=shape)).phases[0] for shape in (LLAMA, windowed))
    assert few.compute < full.compute / 3
    assert few.transfer < full.transfer / 3


# Sequences that the paper trains on A100s of 80 GB with four to a node of 1 TiB, in its way: inputs
# kept on the host, all else computed again, keys outside, 64K tokens in a chunk (figure 4).
PAPER = hardware("a100").changed(node=4, host=2.0**40, sharing=4)
THEIRS = settings(chunk_tokens=65536, order="key", keep_output=0.0, keep_keys=False)
ROWS = [
    ("llama-3-8b", 4, 2, 0.56),
    ("gpt-6.7b", 4, 2, 0.58),
    ("gpt-2.7b", 2, 1, None),
    ("gpt-13b", 8, 3, 0.56),
    ("gpt-30b", 16, 3, 0.50),
    ("llama-3-70b", 32, 4, 0.54),
]


@pytest.mark.parametrize(("model", "gpus", "millions", "reported"), ROWS)
def test_published_runs(model: str, gpus: int, millions: int, reported: float | None) -> None:
    """They fit, and ``hardware_utilization`` is what was reported, within 15 %.

    That is the convention which reproduces the figures: with model FLOPs they would need kernels at
    84 % of the peak, and by the log's way of counting kernels like these would exceed the peak. The
    40 % of the smallest model, and of short sequences, are not explained by it: not tested.
    """
    found = plan(model, millions * M, gpus, PAPER, THEIRS)
    assert found.fits
    assert found.limit == "host"
    if reported is not None:
        assert found.times.hardware_utilization == pytest.approx(reported, rel=0.15)
    assert found.times.model_utilization < 0.45
    assert found.times.logged_utilization > 0.9


def test_the_headline_by_our_way() -> None:
    """8B, 2M tokens, 4 GPUs of 80 GiB: the host limits it, and less is computed twice."""
    theirs = plan("llama-3-8b", 2 * M, 4, PAPER, THEIRS)
    ours = fitted(plan("llama-3-8b", 2 * M, 4, PAPER))
    assert ours.fits
    assert ours.limit == "host"
    assert 0 < ours.job.settings.keep_output < 1
    assert ours.longest_relaxed > 2 * M
    assert ours.times.step < theirs.times.step * 0.9
    assert ours.memory.device_bytes < 60 * GIB


def test_the_longest_sequence_is_the_longest() -> None:
    found = plan("llama-3-8b", M, 4, PAPER)
    chunk = found.job.chunk
    assert found.longest % chunk == 0
    assert plan("llama-3-8b", found.longest, 4, PAPER).fits
    longer = plan("llama-3-8b", found.longest + chunk, 4, PAPER)
    assert not longer.fits
    taken = longer.memory.host_bytes if found.limit == "host" else longer.memory.device_bytes
    room = longer.host_limit if found.limit == "host" else PAPER.memory
    assert taken > room


def test_the_device_limits_where_the_host_is_large() -> None:
    large = PAPER.changed(host=2.0**50)
    found = plan("llama-3-8b", M, 4, large)
    assert found.limit == "device"
    assert 4 * M < found.longest < 8 * M
    assert found.longest_relaxed > found.longest  # weights and optimizer on the host


def test_advice_helps() -> None:
    found = plan("llama-3-8b", 2 * M, 4, PAPER)
    assert not found.fits
    assert any("the host lacks" in line for line in found.advice)
    share = next(line for line in found.advice if line.startswith("keep_keys = false with"))
    output = float(share.split()[-2])
    kept = settings(keep_keys=False, keep_output=output)
    assert plan("llama-3-8b", 2 * M, 4, PAPER, kept).fits


def test_advice_of_more_devices() -> None:
    found = plan("llama-3-70b", 4 * M, 4, PAPER)
    assert not fitted(found).fits
    assert any(line.startswith(("16 devices", "32 devices")) for line in found.advice)


def test_advice_of_larger_chunks() -> None:
    contended = plan("gpt-13b", M, 8, PAPER.changed(host=2.0**45))
    assert contended.fits
    assert any("chunk_tokens = 65536" in line for line in contended.advice)
    wide = plan("gpt-13b", M, 8, PAPER.changed(host=2.0**45), settings(chunk_tokens=65536))
    assert not wide.advice


def test_files_are_no_host_memory() -> None:
    found = plan("llama-3-8b", 6 * M, 4, PAPER, settings(offload="file"))
    assert found.fits
    assert found.limit == "device"


def test_states_on_the_host_make_room() -> None:
    on_device = plan("llama-3-8b", 128 * KIB, 1, "h200", states="device")
    on_host = plan("llama-3-8b", 128 * KIB, 1, "h200", states="host")
    assert on_device.memory.device_bytes - on_host.memory.device_bytes > 16 * 8.03e9 * 0.9
    assert on_host.memory.host["optimizer"] == pytest.approx(8 * 8.03e9, rel=0.01)


def test_a_thousand_devices_are_planned_at_once() -> None:
    begin = time.process_time()
    found = fitted(plan("llama-3.1-405b", 16 * M, 1024, "h100"))
    assert time.process_time() - begin < 2
    assert found.job.sharing == 128
    assert found.job.gpus // found.job.sharing == 8


def test_a_chunk_longer_than_the_sequence_is_the_sequence() -> None:
    found = plan("llama-3-8b", 1000, 1, "h200")
    assert found.job.chunk == 1000
    assert found.job.chunks == 1
    assert found.fits


def test_states_that_fill_the_host_are_planned() -> None:
    tiny = PAPER.changed(host=2.0**30)
    found = fitted(plan("llama-3-8b", M, 4, tiny, settings(offload="none"), states="host"))
    assert not found.fits
    assert found.longest == 0
