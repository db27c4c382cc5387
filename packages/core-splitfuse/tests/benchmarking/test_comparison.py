"""A whole measurement on a tiny model: rounds, gates, tables, files, pictures."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import core
from core_splitfuse.benchmarking import report
from core_splitfuse.benchmarking.comparison import Comparison, Run, compare
from core_splitfuse.benchmarking.driver import Record
from core_splitfuse.benchmarking.gates import SATURATED, STEADY, Gate, gates, judge
from core_splitfuse.benchmarking.peers.ours import splitfuse
from core_splitfuse.benchmarking.plots import plot
from core_splitfuse.benchmarking.probe import serving


@pytest.fixture(scope="module")
def measured(suite):
    told = []
    found, verdicts = suite.gates(50.0, 500.0, tell=told.append)
    return found, verdicts, told


def test_everybody_is_measured_as_often_as_is_due(measured):
    found, _, told = measured
    runs = [(run.round, run.load, run.peer) for run in found.runs]
    assert len(runs) == len(set(runs))
    assert runs.count((1, STEADY, "splitfuse 16")) == 1
    assert (0, SATURATED, "generate, batches of 8") in runs
    assert (1, SATURATED, "generate, batches of 8") not in runs
    assert all(load == STEADY for _, load, peer in runs if peer == "generate, one by one")
    first = [next(peer for turn, _, peer in runs if turn == number) for number in (0, 1)]
    assert first[0] != first[1], "every round begins with somebody else"
    assert any("vLLM CPU 16 is not measured" in line for line in told)


def test_one_round_asks_everybody_the_same(measured):
    found, _, _ = measured
    for load in found.loads:
        for turn in (0, 1):
            asked = {
                tuple((record.prompt, record.arrived) for record in run.records)
                for run in found.runs
                if (run.load, run.round) == (load, turn)
            }
            assert len(asked) == 1


def test_no_prompt_comes_twice(suite):
    seeds, engines = [], []

    def load(seed):
        seeds.append(seed)
        return suite.poisson(100.0)(seed)

    def opened(subject):
        engines.append(ours.open(subject))
        return engines[-1]

    ours = splitfuse(suite.settings)
    compare([replace(ours, open=opened)], {"a": load, "b": load}, suite.subject, rounds=3)
    assert len(set(seeds)) == 6
    assert engines[0].engine.stats().reused_tokens == 0


def test_gates_name_what_was_not_measured(measured):
    _, verdicts, _ = measured
    unknown = {v.gate.peer for v in verdicts if v.holds is None}
    assert unknown == {"vLLM CPU 16"}
    assert {v.gate.peer for v in verdicts if v.holds is not None} == {
        "prefill first",
        "transformers CB 128",
        "transformers CB 2048",
    }


def steady_tokens(gap):
    return tuple(Record(8, i * 1.0, [i + gap * n for n in range(1, 9)]) for i in range(4))


def test_ratios_are_medians_of_the_rounds():
    found = Comparison()
    for turn, (ours, theirs) in enumerate([(0.1, 0.2), (0.1, 0.4), (0.3, 0.1)]):
        found.runs.append(Run(STEADY, "ours", turn, 0, steady_tokens(ours)))
        found.runs.append(Run(STEADY, "theirs", turn, 0, steady_tokens(theirs)))
    assert found.ratio(STEADY, "gap95", "ours", "theirs") == pytest.approx(0.5)
    assert found.ratio(STEADY, "gap95", "ours", "nobody") is None
    verdicts = judge(
        found,
        "ours",
        [Gate(STEADY, "gap95", "theirs", 0.5001), Gate(STEADY, "gap95", "theirs", 0.4999)],
    )
    assert [v.holds for v in verdicts] == [True, False]
    assert judge(found, "ours", [Gate(STEADY, "gap95", "theirs", 0.6, at_most=False)])[0].holds is (
        False
    )


def test_the_gates_are_those_that_were_set():
    found = gates("whole", ["batching"], "outside")
    limits = {(g.load, g.figure, g.peer): (g.limit, g.at_most) for g in found}
    assert limits[SATURATED, "gap95", "whole"] == (0.55, True)
    assert limits[SATURATED, "gap99", "whole"] == limits[STEADY, "gap99", "whole"] == (0.3, True)
    assert limits[SATURATED, "tokens", "whole"] == (0.97, False)
    assert limits[SATURATED, "tokens", "batching"] == (1.3, False)
    assert limits[SATURATED, "gap95", "batching"] == (0.5, True)
    assert limits[STEADY, "gap95", "outside"] == (1.15, True)


def test_what_is_saved_can_be_read_again(measured, tmp_path, capsys):
    found, verdicts, _ = measured
    path = tmp_path / "results.json"
    report.save(path, found, report.conditions(model="tiny"), verdicts)
    again, about, table = report.load(path)
    assert about["model"] == "tiny"
    assert again.missing == found.missing
    for load in found.loads:
        assert again.peers(load) == found.peers(load)
        for peer in found.peers(load):
            ours, theirs = found.median(load, peer), again.median(load, peer)
            assert ours.first95 == pytest.approx(theirs.first95, abs=2e-4)
    assert len(table.rows) == len(verdicts)
    text = report.markdown(path)
    assert "| saturated | p95 gap | at most 0.55 x prefill first |" in text
    assert "vLLM CPU 16" in text
    for shown in report.tables(found):
        shown.echo()
    assert "GAP P50" in capsys.readouterr().out


def test_pictures_are_made_of_loads_and_of_sweeps(measured, suite, tmp_path):
    pytest.importorskip("matplotlib")
    found, _, _ = measured
    made = {path.name for path in plot(found, tmp_path, "svg")}
    assert made == {
        f"{what}-{load}.svg"
        for what in ("token-latency", "gaps-over-time", "effective")
        for load in (STEADY, SATURATED)
    }
    assert "prefill first" in (tmp_path / "effective-steady.svg").read_text()
    sweep = suite.sweep([1, 2], ["splitfuse", "prefill"], requests=4)
    made = {path.name for path in plot(sweep, tmp_path / "sweep", "svg")}
    assert {"latency-throughput.svg", "effective-clients.svg"} < made
    assert "token-latency-2-clients.svg" in made
    assert "token-latency-1-clients.svg" not in made


def test_the_probe_reads_ratios_and_leaves_a_report(suite, tmp_path):
    with core.start(folder=tmp_path, quiet=True) as run:
        readings = {reading.name: reading for reading in serving(run, suite)}
    assert all(reading.status == "ok" for reading in readings.values())
    name = "against prefill first: 95th percentile of the gaps between tokens"
    assert readings[name].unit == "x"
    saved = json.loads((tmp_path / "splitfuse-serving.json").read_text())
    assert {run["peer"] for run in saved["runs"]} >= {"splitfuse 16", "prefill first"}
