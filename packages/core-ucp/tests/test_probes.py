"""``core doctor`` and ``core bench`` of this package answer with figures."""

from __future__ import annotations

from pathlib import Path

from core.testing.fixtures import make_run
from core_ucp.probes import conversion, digests


def test_the_doctor_says_how_fast_digests_are(tmp_path: Path) -> None:
    with make_run(tmp_path) as run:
        (found,) = digests(run)
    assert found.unit == "GB/s"
    assert isinstance(found.value, float)
    assert found.value > 0
    assert found.status in ("ok", "warn")


def test_the_benchmark_compares_with_two_others_and_leaves_nothing(tmp_path: Path) -> None:
    with make_run(tmp_path) as run:
        readings = list(conversion(run, size=2**20))
    peers = [reading.name.rpartition(" ")[2] for reading in readings]
    assert peers == ["cp", "dcp_to_torch_save"]
    assert all(isinstance(reading.value, float) and reading.value > 0 for reading in readings)
    assert not list(tmp_path.glob("tmp*"))
