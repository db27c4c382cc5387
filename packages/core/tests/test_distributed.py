"""Ranks of one job agree on plugins and settings before anything is changed, or none starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from core.distributed import Ranks
from core.errors import CoreError

if TYPE_CHECKING:
    from conftest import Site

RANK = """
import os, sys
import core

def attempt(**given):
    try:
        run = core.start(**given)
    except core.PluginError as error:
        print(error.what.replace("; ", "\\n"))
    else:
        print("agreed", run.rank, run.world_size, sorted(run.ranks.gather(run.rank)))
        run.close()
    print("--", flush=True)

rank = int(os.environ["RANK"])
attempt()
off = core.discover(everything_off=True)
attempt(plugins=off, train={"seed": rank})
attempt(plugins=off)
"""


@pytest.fixture(scope="module")
def told(module_site: Site) -> list[list[str]]:
    """What each of two real gloo ranks says, on machines with different plugins."""
    pytest.importorskip("torch")
    for place, version in [("first", "1.4.0"), ("second", "1.3.0")]:
        module_site.install("core-x", module_site.good, version=version, into=place)
        module_site.install("core-same", module_site.good, into=place)
    module_site.install("core-more", module_site.good, into="second")
    (module_site.work / "rank.py").write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("CORE_")}
    kept |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    kept |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank, place in enumerate(["first", "second"]):
        path = [str(module_site.folder / place), *filter(None, [kept.get("PYTHONPATH")])]
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "PYTHONPATH": os.pathsep.join(path)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "rank.py"],
                cwd=module_site.work,
                env=kept | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append([part.strip() for part in out.split("--")])
    return said


def test_a_rank_with_another_version_stops_all(told: list[list[str]]) -> None:
    first, second = told[0][0], told[1][0]
    assert first == second
    assert first.splitlines() == [
        "rank 1 differs: core-more 1.0 (others absent)",
        "rank 1 differs: core-x 1.3.0 (others 1.4.0)",
    ]


def test_a_rank_with_another_setting_stops_all(told: list[list[str]]) -> None:
    assert told[0][1] == told[1][1] == "rank 1 differs: train.seed 1 (others 0)"


def test_ranks_that_agree_start(told: list[list[str]]) -> None:
    assert [said[2] for said in told] == ["agreed 0 2 [0, 1]", "agreed 1 2 [0, 1]"]


class Three(Ranks):
    """Three ranks of which two are only told about."""

    def gather(self, value: dict[str, str]) -> list[dict[str, str]]:
        return [{**value, "api": "1"}, {**value, "api": "1"}, {**value, "api": "2"}]


def test_the_odd_one_among_many_is_named() -> None:
    with pytest.raises(CoreError) as refused:
        Three(world_size=3).require_same({"same": [1, 2]})
    assert refused.value.what == "rank 2 differs: api 2 (others 1)"
    assert refused.value.fix == "install and configure all ranks alike"


def test_a_single_process_has_no_group() -> None:
    ranks = Ranks()
    ranks.join()
    ranks.require_same({"anything": object()})
    assert (ranks.mesh, ranks.new_cpu_group(), ranks.gather("x")) == (None, None, ["x"])
    ranks.leave()


def test_the_environment_of_torchrun_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(rank=5, world_size=8, local_rank=1)
    monkeypatch.setenv("RANK", "five")
    with pytest.raises(CoreError, match="is no number"):
        Ranks.from_environment()
