"""``core doctor`` and ``core bench`` say what computes here, and how fast."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from core.contributions import Reading
from core.discovery import discover
from core.errors import SettingsError
from core.native import reporting
from core.testing.fixtures import make_run
from core_fp6 import plugin, probes
from core_fp6.kernels import cpu


@pytest.fixture(name="run")
def _run(tmp_path: Path) -> Any:
    with make_run(tmp_path / "run", plugins=discover()) as run:
        yield run


def by_name(found: Any) -> dict[str, Reading]:
    return {reading.name: reading for reading in found}


def test_the_doctor_names_the_cpu_kernel_and_why(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "PATIENCE", 300.0)
    found = by_name(plugin.kernels(run))
    assert {*found} == {"CPU kernel", "Triton", "GPU"}
    kernel = found["CPU kernel"]
    assert kernel.status == ("warn" if kernel.value in ("plain", "eager") else "ok")
    assert (kernel.value, kernel.limit) == (cpu.variant().name, cpu.variant().reason)


def test_a_kernel_that_does_not_work_is_a_failure(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> cpu.Variant:
        raise SettingsError("no CPU variant 'avx1024'", why="there are others", fix="choose one")

    monkeypatch.setattr(cpu, "variant", refuse)
    found = by_name(probes.kernels(run))["CPU kernel"]
    assert (found.status, found.advice) == ("fail", "choose one")
    assert "no CPU variant 'avx1024'" in str(found.value)


def test_the_slowest_kernel_comes_with_advice(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "variant", lambda: cpu.Variant("eager", "there is no C compiler"))
    found = by_name(probes.kernels(run))["CPU kernel"]
    assert (found.status, found.value) == ("warn", "eager")
    assert found.limit == "there is no C compiler"
    assert "C compiler" in found.advice


def test_the_doctor_does_not_wait_for_a_compiler(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Event()

    def compile_slowly() -> cpu.Variant:
        compiled.wait(60)
        return cpu.Variant("avx2", "")

    monkeypatch.setattr(cpu, "variant", compile_slowly)
    monkeypatch.setattr(reporting, "PATIENCE", 0.01)
    found = by_name(probes.kernels(run))["CPU kernel"]
    compiled.set()
    assert found.status == "skip"
    assert "compiled" in str(found.value)


def test_without_torch_and_triton_there_is_a_reading_that_says_so(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    absent = {"torch", "triton"}

    def find(name: str, package: str | None = None) -> Any:
        return None if name in absent else real(name, package)

    monkeypatch.setattr(plugin, "find_spec", find)
    (found,) = plugin.kernels(run)
    assert (found.status, found.value) == ("skip", "needs torch")
    absent.discard("torch")
    monkeypatch.setattr(probes, "find_spec", find)
    assert by_name(plugin.kernels(run))["Triton"].status == "skip"


def test_the_benchmark_compares_with_both_dtypes(run: Any) -> None:
    found = list(probes.cpu_linear(run, size=128, tokens=(1, 3)))
    assert [reading.name for reading in found] == [
        f"128 x 128, {tokens} tokens, {dtype}"
        for dtype in ("bfloat16", "float32")
        for tokens in (1, 3)
    ]
    assert all(reading.unit == "x" and float(reading.value) > 0 for reading in found)
