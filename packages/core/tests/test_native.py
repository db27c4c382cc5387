"""C kernels are built once, kept where nobody else writes, and their absence has a reason."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from core.errors import SettingsError
from core.native import Build, Kernels, Sources, Variant, building, choosing, load, reporting

PLAIN = Build("plain", (), ("squares.c",))
FAST = Build("fast", ("no_such_feature",), ("squares.c",))
SQUARES = """
#include "threads.h"

struct squares { int64_t *out; };

static void square(const void *of, int64_t index) {
    ((const struct squares *)of)->out[index] = index * index;
}

void squares(int64_t *out, int64_t count, int threads) {
    struct squares of = {out};
    run_parallel(square, &of, count, threads);
}
"""
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@dataclass
class Squares:
    """Squares of the first numbers, by C where there is a library."""

    variant: Variant
    library: ctypes.CDLL | None = None

    def __call__(self, count: int, threads: int = 1) -> list[int]:
        if self.library is None:
            return [number**2 for number in range(count)]
        out = (ctypes.c_int64 * count)()
        self.library.squares(out, ctypes.c_int64(count), threads)
        return list(out)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of the libraries."""
    monkeypatch.delenv("CORE_HELLO_CPU", raising=False)
    monkeypatch.setenv("CORE_HELLO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path, folder: Path) -> Sources:
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "squares.c").write_text(SQUARES)
    return Sources("core-hello", tmp_path / "native")


@pytest.fixture
def kernels(sources: Sources) -> Kernels[Squares]:
    return Kernels[Squares](
        sources,
        builds=[FAST, PLAIN],
        native=lambda library, variant: Squares(variant, library),
        without="python",
        otherwise=Squares,
        loss="squares take long",
    )


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@needs_compiler
def test_a_library_is_built_once(folder: Path, sources: Sources) -> None:
    load(sources, PLAIN)
    [path] = libraries(folder)
    built = path.stat().st_mtime_ns
    load(sources, PLAIN)
    assert libraries(folder) == [path]
    assert path.stat().st_mtime_ns == built
    assert path.stat().st_mode & 0o077 == folder.stat().st_mode & 0o077 == 0


@needs_compiler
def test_changed_sources_give_another_library(folder: Path, sources: Sources) -> None:
    load(sources, PLAIN)
    (sources.folder / "squares.c").write_text(SQUARES + "/* faster */")
    load(sources, PLAIN)
    assert len(libraries(folder)) == 2


@needs_compiler
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_damaged_library_is_built_again(
    folder: Path, kernels: Kernels[Squares], keep: int
) -> None:
    load(kernels.sources, PLAIN)
    [path] = libraries(folder)
    content = path.read_bytes()
    path.unlink()  # the loaded one stays as it is
    path.write_bytes(content[:keep])
    path.chmod(0o700)
    assert kernels.force("plain")(4) == [0, 1, 4, 9]
    assert len(path.read_bytes()) == len(content)


@needs_compiler
def test_a_library_for_another_processor_is_not_taken(
    folder: Path, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(sources, PLAIN)
    monkeypatch.setattr(building, "processor", lambda: frozenset({"another"}))
    load(sources, PLAIN)
    assert len(libraries(folder)) == 2


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_several_processes_may_build_at_once(folder: Path, sources: Sources) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=load, args=(sources, PLAIN)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(libraries(folder)) == 1


@needs_compiler
def test_a_folder_that_others_can_write_to_is_not_used(
    folder: Path, kernels: Kernels[Squares], caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    with caplog.at_level(logging.WARNING):
        assert kernels.force("plain")(3) == [0, 1, 4]
    assert "others can write to it" in caplog.text
    assert "CORE_HELLO_CACHE" in caplog.text
    assert libraries(folder) == []


@needs_compiler
def test_a_library_that_others_can_write_to_is_built_again(folder: Path, sources: Sources) -> None:
    load(sources, PLAIN)
    [path] = libraries(folder)
    path.chmod(0o777)
    load(sources, PLAIN)
    assert path.stat().st_mode & 0o022 == 0


@needs_compiler
def test_the_processor_decides(kernels: Kernels[Squares], monkeypatch: pytest.MonkeyPatch) -> None:
    found = kernels.chosen()
    assert found.variant.name == "plain"
    assert found.variant.reason == "not fast: the processor has no no_such_feature"
    assert kernels.chosen() is found
    # A compiler that knows nothing of such a feature is asked when the processor has it.
    monkeypatch.setattr(choosing, "processor", lambda: frozenset({"no_such_feature"}))
    reason = kernels.force(None).variant.reason
    assert reason.startswith("not fast: ")
    assert "failed" in reason


def test_without_a_compiler_there_is_another_way_and_a_reason(
    kernels: Kernels[Squares], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "false")
    with caplog.at_level(logging.WARNING):
        found = kernels.chosen()
        assert kernels.chosen()(3) == [0, 1, 4]
    assert found.variant.name == "python"
    assert "false failed" in found.variant.reason
    [notice] = [record.getMessage() for record in caplog.records]
    assert notice.startswith("squares take long: not fast: ")
    assert "install a C compiler" in notice


def test_a_compiler_that_is_not_there_is_named(
    kernels: Kernels[Squares], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert "CC is 'no-such-compiler -O1'" in kernels.chosen().variant.reason


def test_the_environment_names_a_variant(
    kernels: Kernels[Squares], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORE_HELLO_CPU", "python")
    assert kernels.chosen().variant == Variant("python", "asked for")
    monkeypatch.setenv("CORE_HELLO_CPU", "quantum")
    with pytest.raises(SettingsError, match="no CPU variant 'quantum'"):
        kernels.force(None)


def test_a_variant_that_does_not_work_here_is_refused(kernels: Kernels[Squares]) -> None:
    with pytest.raises(SettingsError, match="fast does not work here") as error:
        kernels.force("fast")
    assert "CORE_HELLO_CPU" in error.value.fix


@needs_compiler
def test_threads_share_the_work(kernels: Kernels[Squares]) -> None:
    squares = kernels.force("plain")
    wanted = [number**2 for number in range(1000)]
    results: list[list[int]] = []
    callers = [threading.Thread(target=lambda: results.append(squares(1000, 3))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert results == [wanted] * 4


@pytest.mark.parametrize(
    ("variant", "status"), [("plain", "ok"), ("python", "warn")], ids=["good", "slow"]
)
def test_the_doctor_is_told_what_computes(variant: str, status: str) -> None:
    found = reporting.reading(
        "squares", lambda: Variant(variant, "because"), slow=("python",), advice="install C"
    )
    assert (found.status, found.value, found.limit) == (status, variant, "because")
    assert bool(found.advice) == (status == "warn")


def test_the_doctor_is_told_what_is_wrong(kernels: Kernels[Squares]) -> None:
    variant: Callable[[], Variant] = lambda: kernels.force("quantum").variant  # noqa: E731
    found = reporting.reading("squares", variant, slow=(), advice="")
    assert (found.status, found.advice) == ("fail", "choose one of these")


def test_the_doctor_does_not_wait_for_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "PATIENCE", 0.01)
    compiled = threading.Event()

    def compile_slowly() -> Variant:
        compiled.wait(60)
        return Variant("plain", "")

    found = reporting.reading("squares", compile_slowly, slow=(), advice="")
    compiled.set()
    assert found.status == "skip"
    assert "compiled" in str(found.value)
