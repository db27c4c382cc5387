"""The benchmark runs every method, on a state small enough that only its form is looked at."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.errors import CheckpointError
from core.testing.fixtures import make_run, plugin_of
from core_fastpersist.bench import measuring, ours, peers, probe, raw
from core_fastpersist.bench.measuring import Figures, interleave
from core_fastpersist.bench.raw import Cost
from core_fastpersist.bench.report import Report, plot, run
from core_fastpersist.bench.state import State, make_state, total
from core_fastpersist.plugin import Plugin

SIZE = 2**20
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "save_speed.py"
EVERY_SAVE = {
    "torch.save + fsync",
    "safetensors.save_file + fsync",
    "dcp.save",
    "dcp.async_save, until durable",
    "fastpersist: save",
    "fastpersist: save, adopted",
    "fastpersist: dcp.save",
}
EVERY_LOAD = {
    "torch.load",
    "safetensors.load_file",
    "fastpersist: load",
    "fastpersist: load, into",
}


@pytest.fixture(name="state", scope="module")
def _state() -> State:
    return make_state(SIZE)


@pytest.fixture(name="report", scope="module")
def _report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run(tmp_path_factory.mktemp("bench"), SIZE, repeats=2)


def test_every_method_is_measured_in_every_repetition(report: Report) -> None:
    assert set(report.saves) == EVERY_SAVE | {report.raw}
    assert set(report.loads) == EVERY_LOAD
    for figures in [*report.saves.values(), *report.loads.values()]:
        assert len(figures.costs) == 2
        assert figures.size == report.conditions["bytes"]
        assert all(cost.seconds > 0 and cost.cpu >= 0 for cost in figures.costs)


def test_the_json_is_json_with_both_sides_of_every_ratio(report: Report) -> None:
    content = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert content["conditions"]["bytes"] <= SIZE
    rows = {row["method"]: row for row in content["saves"]}
    assert rows[peers.TORCH_SAVE]["x_torch"] == 1
    assert rows[report.raw]["of_raw"] == 1
    for row in rows.values():
        paired = zip(row["seconds"], rows[peers.TORCH_SAVE]["seconds"], strict=True)
        ratios = sorted(plain / own for own, plain in paired)
        assert math.isclose(row["x_torch"], sum(ratios) / 2, rel_tol=1e-9)


def test_the_tables_have_a_row_for_every_method(report: Report) -> None:
    (saves, loads) = report.tables()
    assert {row[0] for row in saves[1]} == set(report.saves)
    assert {row[0] for row in loads[1]} == set(report.loads)
    assert all(len(row) == len(saves[0]) for row in saves[1])


def test_the_chart_is_a_picture(report: Report, tmp_path: Path) -> None:
    plot(report, tmp_path / "deep" / "chart.png")
    assert (tmp_path / "deep" / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    run(tmp_path, SIZE, repeats=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", sorted(EVERY_LOAD))
def test_what_a_method_loads_is_what_was_saved(method: str, state: State, tmp_path: Path) -> None:
    how, load = {**peers.loads(), **ours.loads(state)}[method]
    save = {**peers.saves(state), **ours.saves(state)}[how]
    save(tmp_path / "saved")
    found = load(tmp_path / "saved")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("size", [2**20, 3 * 2**20 + 5, 40 * 2**20])
def test_a_state_has_almost_the_size_that_was_asked_for(size: int) -> None:
    state = make_state(size)
    assert 0.8 * size < total(state) <= size
    assert all(
        tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in state.values()
    )


def test_the_order_is_another_in_each_repetition(tmp_path: Path) -> None:
    calls: list[str] = []

    def method(name: str) -> Callable[[Path], None]:
        return lambda path: calls.append(name)

    names = "abcdef"
    interleave({name: method(name) for name in names}, 1, tmp_path, 4, seed=1)
    rounds = ["".join(calls[index : index + 6]) for index in range(0, 24, 6)]
    assert all(sorted(each) == list(names) for each in rounds)
    assert len(set(rounds)) > 1


def test_ratios_are_taken_within_a_repetition() -> None:
    ours_ = Figures(10**9, (Cost(1, 1), Cost(2, 1), Cost(10, 1)))
    other = Figures(10**9, (Cost(4, 1), Cost(8, 1), Cost(50, 1)))
    assert ours_.faster_than(other) == 4
    assert (ours_.speed, ours_.best) == (0.5, 1)


def test_processor_time_of_children_counts(tmp_path: Path) -> None:
    program = "import time\nwhile time.process_time() < 0.3: pass"

    def work(path: Path) -> None:
        subprocess.run([sys.executable, "-c", program], check=True)

    assert measuring.timed(work, tmp_path).cpu > 0.25


def test_a_dropped_file_is_read_from_the_disk_again(tmp_path: Path) -> None:
    file = tmp_path / "in" / "file"
    file.parent.mkdir()
    file.write_bytes(random.Random(0).randbytes(2**20))
    measuring.drop(tmp_path)
    assert cached(file) == 0
    file.read_bytes()
    assert cached(file) > 0


def cached(path: Path) -> int:
    """Pages of a file in the page cache, as ``mincore`` counts them."""
    import ctypes
    import mmap

    size = path.stat().st_size
    descriptor = os.open(path, os.O_RDWR)
    try:
        with mmap.mmap(descriptor, size) as mapping:
            pages = -(-size // mmap.PAGESIZE)
            present = (ctypes.c_ubyte * pages)()
            first = ctypes.c_char.from_buffer(mapping)
            start = ctypes.c_void_p(ctypes.addressof(first))
            assert ctypes.CDLL(None).mincore(start, ctypes.c_size_t(size), present) == 0
            del first
            return sum(page & 1 for page in present)
    finally:
        os.close(descriptor)


def test_a_raw_write_has_the_size_and_is_no_hole(tmp_path: Path) -> None:
    size = 5 * 2**20 + 3
    name, write = raw.raw_device(tmp_path, size)
    write(tmp_path / "raw")
    assert name.startswith("raw device")
    found = (tmp_path / "raw").stat()
    assert abs(found.st_size - size) < 4096
    assert found.st_blocks * 512 >= size - 4096


FIO = """#!{python}
import json, pathlib, sys
options = dict(a[2:].split("=", 1) for a in sys.argv[1:])
if options["ioengine"] == "libaio" and not {libaio}:
    sys.exit("fio: engine libaio not loadable")
pathlib.Path(options["filename"]).write_bytes(bytes(int(options["size"])))
assert options["direct"] == "1" and options["end_fsync"] == "1"
print("note: both iodepth >= 1 and synchronous I/O engine are selected")
job = {{"write": {{"bw_bytes": 2 * 10**6}}, "usr_cpu": 10.0, "sys_cpu": 30.0}}
print(json.dumps({{"jobs": [job]}}))
"""


@pytest.mark.parametrize("libaio", [True, False])
def test_fio_measures_itself(libaio: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "fio"
    tool.parent.mkdir()
    tool.write_text(FIO.format(python=sys.executable, libaio=libaio))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    name, write = raw.raw_device(tmp_path, 10**6)
    assert name == f"raw device (fio {'libaio' if libaio else 'psync'})"
    cost = write(tmp_path / "raw")
    assert cost == Cost(seconds=0.5, cpu=0.2)


def test_without_direct_io_there_is_no_raw_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core_fastpersist.direct.alignment import Alignment

    nothing = Alignment(direct=False, reason="no such thing")
    monkeypatch.setattr(raw, "alignment_of", lambda folder: nothing)
    with pytest.raises(CheckpointError, match="no such thing"):
        run(tmp_path, SIZE, repeats=1)


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="are free"):
        measuring.require_room(tmp_path, 2**60, ["a"])


def test_core_bench_shows_ratios_and_leaves_report_and_chart(tmp_path: Path) -> None:
    with make_run(tmp_path / "run", plugins=plugin_of(Plugin(), "fastpersist")) as started:
        readings = list(probe.readings(started, SIZE, repeats=1))
    named = {reading.name: reading for reading in readings}
    assert {f"durable save: {name}" for name in EVERY_SAVE} <= set(named)
    assert {f"cold load: {name}" for name in EVERY_LOAD} <= set(named)
    plain = named["durable save: torch.save + fsync"]
    assert (plain.value, plain.unit) == (1, "x")
    content: Any = json.loads(Path(str(named["report"].value)).read_text())
    assert {row["method"] for row in content["loads"]} == EVERY_LOAD
    assert Path(str(named["chart"].value)).read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not SCRIPT.is_file(), reason="these tests are not in the repository")
def test_the_script_writes_json_and_chart(tmp_path: Path) -> None:
    files = ["--json", tmp_path / "speed.json", "--plot", tmp_path / "speed.png"]
    call = [SCRIPT, "--size", "1e6", "--repeats", "1", "--folder", tmp_path, *files]
    done = subprocess.run(
        [sys.executable, *map(str, call)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "X TORCH" in done.stdout
    assert json.loads((tmp_path / "speed.json").read_text())["saves"]
    assert (tmp_path / "speed.png").is_file()
