"""The best variant computes; without a compiler it is torch, which is said once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from core.errors import SettingsError
from core.native import choosing
from core_fp6.kernels import cpu
from core_fp6.weights.packed import quantize
from core_fp6.weights.scaling import Scheme


@pytest.fixture(autouse=True)
def chosen_anew():
    yield
    cpu.force(None)


def test_without_a_compiler_torch_computes_and_says_so_once(
    tmp_path: Path, monkeypatch, caplog, within
):
    monkeypatch.setenv("CORE_FP6_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    weight = quantize(torch.randn(40, 300), Scheme(), layout="execution")
    with caplog.at_level(logging.WARNING):
        assert cpu.force(None).name == "eager"
        for tokens in (1, 20):
            x = torch.randn(tokens, 300).bfloat16()
            within(cpu.linear(x, weight), x, weight)
    [notice] = [record.getMessage() for record in caplog.records]
    assert "false failed" in notice
    assert "install a C compiler" in notice
    assert "false failed" in cpu.variant().reason


def test_the_processor_decides(monkeypatch):
    monkeypatch.setattr(choosing, "processor", frozenset)
    found = cpu.force(None)
    assert found.name in ("plain", "eager")
    assert "not avx512: the processor has no avx2, fma" in found.reason


def test_the_environment_names_a_variant(monkeypatch):
    monkeypatch.setenv("CORE_FP6_CPU", "eager")
    assert cpu.force(None).name == "eager"
    monkeypatch.setenv("CORE_FP6_CPU", "quantum")
    with pytest.raises(SettingsError, match="there are avx512, avx2, plain, eager"):
        cpu.force(None)


def test_a_variant_that_does_not_work_here_is_refused(monkeypatch):
    monkeypatch.setattr(choosing, "processor", frozenset)
    with pytest.raises(SettingsError, match="avx512 does not work here"):
        cpu.force("avx512")
