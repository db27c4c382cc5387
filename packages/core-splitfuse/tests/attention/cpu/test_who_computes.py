"""C kernels compute where they can, torch where they cannot, and there is a reason for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from core.discovery import discover
from core.errors import SettingsError
from core.testing.fixtures import make_run
from core_splitfuse.attention.cpu import KERNELS, Listed, Native, Stored, choose
from core_splitfuse.attention.cpu.probes import attention
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.spans import Span


@pytest.fixture(autouse=True)
def chosen_anew():
    yield
    KERNELS.force(None)


@pytest.fixture(name="run")
def _run(tmp_path: Path) -> Any:
    with make_run(tmp_path / "run", plugins=discover()) as run:
        yield run


def rows(width: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 32, width).to(dtype)


def test_without_a_compiler_torch_computes_and_says_so_once(
    tmp_path, monkeypatch, caplog, world, near, run
):
    monkeypatch.setenv("CORE_SPLITFUSE_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    case, rule = world([(30, 1), (0, 9), (20, 5)]), Rule(0.25, window=12)
    with caplog.at_level(logging.WARNING):
        KERNELS.force(None)
        near(case.attend(rule), case.exact(rule))
    [notice] = [record.getMessage() for record in caplog.records]
    assert "false failed" in notice
    assert "install a C compiler" in notice
    way = choose(rows(), rows())
    assert way.kernel is None
    assert "false failed" in way.reason
    [reading] = attention(run)
    assert (reading.status, reading.value) == ("warn", "torch")
    assert "false failed" in reading.limit
    assert "C compiler" in reading.advice


def test_the_doctor_names_the_kernel(run, monkeypatch):
    chosen = KERNELS.chosen().variant
    [reading] = attention(run)
    assert (reading.value, reading.limit) == (chosen.name, chosen.reason)


@pytest.mark.parametrize(
    ("keys", "values", "reason"),
    [
        (rows(dtype=torch.float16), rows(dtype=torch.float16), "float16 is left to torch"),
        (rows().double(), rows().double(), "float64 is left to torch"),
        (rows(), rows(dtype=torch.bfloat16), "keys are float32 and values bfloat16"),
        (rows(2049), rows(), "heads of 2049 elements are left to torch"),
        (rows().to("meta"), rows().to("meta"), "keys and values are on meta"),
        (torch.nn.Parameter(rows()), rows(), "keys and values are of the kind Parameter"),
    ],
)
def test_what_the_kernels_cannot_do_is_left_to_torch(native, keys, values, reason):
    way = choose(keys, values)
    assert way.kernel is None
    assert reason in way.reason


def test_what_they_can_do_is_theirs(native):
    for dtype in (torch.float32, torch.bfloat16):
        way = choose(rows(dtype=dtype), rows(24, dtype))
        assert way.kernel is not None
        assert way.reason == f"{native}: asked for"


def test_float16_is_computed_by_torch(world):
    case, rule = world([(30, 1), (0, 9)], dtype=torch.float16), Rule(0.25)
    for found, exact in zip(case.attend(rule), case.exact(rule), strict=True):
        assert torch.allclose(found.double(), exact, rtol=0, atol=5e-3)


def test_the_environment_names_a_variant(monkeypatch):
    monkeypatch.setenv("CORE_SPLITFUSE_CPU", "torch")
    assert KERNELS.force(None).variant.name == "torch"
    monkeypatch.setenv("CORE_SPLITFUSE_CPU", "quantum")
    with pytest.raises(SettingsError, match="no CPU variant 'quantum'"):
        KERNELS.force(None)


def test_what_is_not_there_is_refused(native):
    kernel = KERNELS.chosen()
    assert isinstance(kernel, Native)
    stored = Stored(rows(), rows())
    query, out = torch.randn(2, 1, 8), torch.empty(1, 2, 8)

    def listed(block: int) -> Listed:
        span = Span(0, 0, 1, [block], prompt=1, known=1)
        return Listed([span], torch.tensor([block * 16]), 16)

    kernel.attend(stored, query, listed(1), Rule(1.0), out)
    with pytest.raises(IndexError, match="48 slots are asked for, and the store has 32"):
        kernel.attend(stored, query, listed(2), Rule(1.0), out)
    new = torch.randn(2, 1, 8)
    with pytest.raises(IndexError, match="48 slots"):
        kernel.keep(stored, new, new, listed(2))
    for wrong in (torch.randn(2, 1, 9), new.double()):
        with pytest.raises(ValueError, match="rows of 8 torch.float32 are kept"):
            kernel.keep(stored, wrong, new, listed(1))
        with pytest.raises(ValueError, match="rows of 8 torch.float32 are kept"):
            kernel.attend(stored, wrong, listed(1), Rule(1.0), out)
