"""Choices of kernels: guessed, measured, kept in a file that is not trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from core_fp6.models.linear import FP6Linear
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.packed import quantize
from core_fp6.weights.scaling import ROW, Scheme

triton = pytest.importorskip("triton")

from core_fp6.kernels.gpu import tuned, tuning  # noqa: E402
from core_fp6.kernels.gpu.configs import (  # noqa: E402
    Config,
    Device,
    bucket,
    candidates,
    default,
    shared_memory,
)
from core_fp6.kernels.gpu.tuned import LIBRARY, Key  # noqa: E402

H200 = Device("NVIDIA H200", 132, 227 * 1024)
SMALL = Device("small", 30, 48 * 1024)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.entries.cache_clear()


def key(tokens: int = 16) -> Key:
    return Key.of("NVIDIA H200", tokens, 8192, 8192, torch.bfloat16, "e2m3-g128")


@pytest.mark.parametrize("tokens", [1, 8, 16, 17, 64, 128, 300, 512])
@pytest.mark.parametrize(("rows", "columns"), [(10240, 8192), (8192, 28672), (1024, 300), (1, 1)])
@pytest.mark.parametrize("device", [H200, SMALL], ids=lambda device: device.name)
def test_guesses_fit_the_device(tokens: int, rows: int, columns: int, device: Device) -> None:
    config = default(tokens, rows, columns, 2, device)
    assert shared_memory(config, 2) <= device.shared_memory
    assert config.splits <= max(1, -(-columns // 256))


@pytest.mark.parametrize(("rows", "columns"), [(10240, 8192), (8192, 8192), (8192, 28672)])
def test_small_batches_occupy_all_multiprocessors(rows: int, columns: int) -> None:
    config = default(1, rows, columns, 2, H200)
    assert -(-rows // config.rows) * config.splits >= H200.processors


def test_candidates_fit_the_device_and_the_columns() -> None:
    found = candidates(16, 1024, 2, H200)
    assert len(found) == len(set(found)) > 4
    assert all(shared_memory(config, 2) <= H200.shared_memory for config in found)
    assert all(config.splits <= 2 for config in found)


def test_numbers_of_tokens_share_choices() -> None:
    assert [bucket(tokens) for tokens in (1, 16, 17, 100, 512)] == [16, 16, 32, 128, 512]
    assert str(key(3)) == str(key(16)) != str(key(17))


def test_choices_come_back_from_the_file() -> None:
    choices = {str(key()): Config(128, 16, 4), str(key(64)): LIBRARY}
    tuned.write(tuned.path(), choices)
    assert tuned.read(tuned.path()) == choices
    assert tuned.chosen(key()) == Config(128, 16, 4)
    assert tuned.chosen(key(32)) is None


def test_the_file_stays_small() -> None:
    many = {f"key {number}": Config(128, 16) for number in range(tuned.MOST_ENTRIES + 10)}
    tuned.write(tuned.path(), many)
    kept = tuned.read(tuned.path())
    assert len(kept) == tuned.MOST_ENTRIES
    assert f"key {tuned.MOST_ENTRIES + 9}" in kept


def entry(value: object) -> str:
    content = {"version": tuned.VERSION, "triton": triton.__version__, "entries": {"key": value}}
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"entries": 3}',
        entry("nothing"),
        entry({"rows": 128}),
        entry({"rows": 128, "tokens": 16, "more": 1}),
        entry({"rows": 10**9, "tokens": 16}),
        entry({"rows": 128.0, "tokens": 16}),
        entry({"rows": 128, "tokens": 16, "splits": True}),
        " " * (tuned.MOST_BYTES + 1),
    ],
    ids=lambda text: text[:60],
)
def test_a_damaged_file_is_reported_and_not_used(text: str) -> None:
    tuned.path().parent.mkdir(parents=True)
    tuned.path().write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match="gpu.json is ignored"):
        assert tuned.chosen(key()) is None


def test_choices_of_another_triton_are_not_used() -> None:
    tuned.write(tuned.path(), {str(key()): LIBRARY})
    text = tuned.path().read_text(encoding="utf-8")
    tuned.path().write_text(text.replace(triton.__version__, "1.0"), encoding="utf-8")
    assert tuned.read(tuned.path()) == {}


def test_the_fastest_is_used_kept_and_not_measured_again() -> None:
    weight = quantize(torch.randn(64, 1024), Scheme(E2M3, 128), layout="execution")
    times = iter([5.0, 3.0, 4.0] + [9.0] * 1000)
    assert tuning.prepare([weight], [3, 16, 4096], measure=lambda call: next(times)) == 1
    wanted = candidates(16, 1024, 2, tuning.device_of(weight.low.device))[1]
    name = Key.of("interpreter", 5, 64, 1024, torch.bfloat16, "e2m3-g128")
    assert tuned.chosen(name) == wanted
    tuned.entries.cache_clear()
    assert tuned.chosen(name) == wanted
    assert tuning.prepare([weight], [3, 16], measure=lambda call: 1.0) == 0


def test_the_library_is_measured_where_it_is_exact() -> None:
    calls: list[object] = []

    def last_is_fastest(call: object) -> float:
        calls.append(call)
        return -float(len(calls))

    for scheme, library in ((Scheme(E3M2, ROW), True), (Scheme(E2M3, 128), False)):
        weight = quantize(torch.randn(64, 512), scheme, layout="execution")
        x = torch.randn(16, 512)
        assert (tuning.fastest(x, weight, False, last_is_fastest) == LIBRARY) is library


def test_what_needs_too_much_is_never_chosen() -> None:
    weight = quantize(torch.randn(64, 512), Scheme(E2M3, 128), layout="execution")

    def refuses_most(call: object) -> float:
        refuses_most.count += 1
        if refuses_most.count != 4:
            raise triton.OutOfResources(300_000, 232_448, "shared memory")
        return 7.0

    refuses_most.count = 0
    found = tuning.fastest(torch.randn(16, 512), weight, False, refuses_most)
    assert found == candidates(16, 512, 4, tuning.device_of(weight.low.device))[3]


def test_modules_of_a_model_are_found() -> None:
    scheme = Scheme(E2M3, 128)
    model = nn.Sequential(*(FP6Linear.from_linear(nn.Linear(256, n), scheme) for n in (8, 8, 16)))
    assert tuning.prepare(model, [1, 64], measure=lambda call: 1.0) == 4


def test_one_process_alone_measures_and_tells_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize(torch.randn(64, 512), Scheme(E2M3, 128), layout="execution")
    told = {str(Key.of("interpreter", 16, 64, 512, torch.bfloat16, "e2m3-g128")): Config(64, 16)}

    def broadcast(box: list[object], src: int) -> None:
        assert box == [{}]
        assert src == 0
        box[0] = told

    monkeypatch.setattr(tuning.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(tuning.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(tuning.distributed, "broadcast_object_list", broadcast)
    assert tuning.prepare([weight], [16], measure=lambda call: pytest.fail("measured")) == 1
    assert tuned.entries() == told
    assert not tuned.path().exists()


def test_the_first_process_of_a_group_measures() -> None:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        weight = quantize(torch.randn(64, 512), Scheme(E2M3, 128), layout="execution")
        assert tuning.prepare([weight], [16], measure=lambda call: 1.0) == 1
    finally:
        distributed.destroy_process_group()
    assert len(tuned.read(tuned.path())) == 1
