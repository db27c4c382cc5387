from __future__ import annotations

import logging
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from core.errors import SettingsError
from core_fp6.kernels import cpu
from core_fp6.kernels.cpu import building, choosing
from core_fp6.kernels.cpu.features import BUILDS
from core_fp6.weights.packed import Packed, quantize
from core_fp6.weights.scaling import Scheme

PLAIN = BUILDS[-1]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@pytest.fixture(autouse=True)
def chosen_anew():
    yield
    cpu.force(None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CORE_FP6_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def weight() -> Packed:
    return quantize(torch.randn(40, 300), Scheme(), layout="execution")


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_without_a_compiler_torch_computes_and_says_so_once(
    folder, monkeypatch, caplog, weight, within
):
    monkeypatch.setenv("CC", "false")
    with caplog.at_level(logging.WARNING):
        assert cpu.force(None).name == "eager"
        for tokens in (1, 20):
            x = torch.randn(tokens, 300).bfloat16()
            within(cpu.linear(x, weight), x, weight)
    [notice] = [record.getMessage() for record in caplog.records]
    assert "false failed" in notice
    assert "install a C compiler" in notice
    assert "false failed" in cpu.variant().reason


def test_a_compiler_that_is_not_there_is_named(folder, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert "CC is 'no-such-compiler -O1'" in cpu.force(None).reason


@needs_compiler
def test_a_library_is_built_once(folder, monkeypatch):
    building.load(PLAIN)
    [path] = libraries(folder)
    built = path.stat().st_mtime_ns
    building.load(PLAIN)
    assert libraries(folder) == [path]
    assert path.stat().st_mtime_ns == built
    assert path.stat().st_mode & 0o077 == folder.stat().st_mode & 0o077 == 0


@needs_compiler
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_damaged_library_is_built_again(folder, weight, within, keep):
    building.load(PLAIN)
    [path] = libraries(folder)
    content = path.read_bytes()
    path.unlink()  # the loaded one stays as it is
    path.write_bytes(content[:keep])
    path.chmod(0o700)
    cpu.force("plain")
    assert len(path.read_bytes()) == len(content)
    x = torch.randn(3, 300)
    within(cpu.linear(x, weight), x, weight)


@needs_compiler
def test_a_library_for_another_processor_is_not_taken(folder, monkeypatch):
    building.load(PLAIN)
    monkeypatch.setattr(building, "processor", lambda: frozenset({"another"}))
    building.load(PLAIN)
    assert len(libraries(folder)) == 2


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_several_processes_may_build_at_once(folder):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=building.load, args=(PLAIN,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(libraries(folder)) == 1


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_used(folder, caplog, weight, within):
    folder.mkdir()
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert cpu.force("plain").name == "plain"
    assert "others can write to it" in caplog.text
    assert libraries(folder) == []
    x = torch.randn(3, 300)
    within(cpu.linear(x, weight), x, weight)


@needs_compiler
def test_a_library_that_others_can_write_to_is_built_again(folder):
    building.load(PLAIN)
    [path] = libraries(folder)
    path.chmod(0o777)
    building.load(PLAIN)
    assert path.stat().st_mode & 0o022 == 0


@needs_compiler
def test_the_processor_decides(folder, monkeypatch):
    monkeypatch.setattr(choosing, "processor", frozenset)
    found = cpu.force(None)
    assert found.name == "plain"
    assert "not avx512: the processor has no avx2, fma" in found.reason


def test_the_environment_names_a_variant(monkeypatch):
    monkeypatch.setenv("CORE_FP6_CPU", "eager")
    assert cpu.force(None).name == "eager"
    monkeypatch.setenv("CORE_FP6_CPU", "quantum")
    with pytest.raises(SettingsError, match="no CPU variant 'quantum'"):
        cpu.force(None)


def test_a_variant_that_does_not_work_here_is_refused(monkeypatch):
    monkeypatch.setattr(choosing, "processor", frozenset)
    with pytest.raises(SettingsError, match="avx512 does not work here"):
        cpu.force("avx512")
