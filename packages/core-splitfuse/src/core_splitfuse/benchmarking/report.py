"""A comparison as tables, as JSON that it can be read from again, and as Markdown."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from core.cli.table import echo_table
from core.disk import replace_file
from core_splitfuse.benchmarking.comparison import Comparison, Run
from core_splitfuse.benchmarking.driver import Record
from core_splitfuse.benchmarking.figures import Figures
from core_splitfuse.benchmarking.gates import Verdict

_PACKAGES = ("core-splitfuse", "torch", "transformers", "numpy")
_NAMES = {
    "gap50": "median gap",
    "gap95": "p95 gap",
    "gap99": "p99 gap",
    "tokens": "tokens/s",
    "first50": "median first token",
}


@dataclass(frozen=True)
class Table:
    """A head, rows, and what it is of."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def echo(self) -> None:
        """Print it to the terminal."""
        print(f"\n{self.title}")
        echo_table([cell.upper() for cell in self.head], self.rows)

    def markdown(self) -> str:
        """As a table of Markdown."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def tables(found: Comparison) -> list[Table]:
    """A table of figures for each load; seconds."""
    made = [_table(found, load) for load in found.loads]
    if found.missing:
        rows = list(found.missing.items())
        made.append(Table("Not measured", ("peer", "why"), rows))
    return made


def _table(found: Comparison, load: str) -> Table:
    kept = [f"effective {rate:g}" for rate in found.rates]
    head = ("peer", "gap p50", "p90", "p95", "p99", "max", "first p50", "first p95")
    rows = [(peer, *_cells(found.median(load, peer))) for peer in found.peers(load)]
    return Table(load, (*head, "latency", "tokens/s", "queries/s", *kept), rows)


def _cells(got: Figures) -> Iterable[str]:
    yield from (f"{v:.3f}" for v in (got.gap50, got.gap90, got.gap95, got.gap99, got.gap_max))
    yield from (f"{v:.2f}" for v in (got.first50, got.first95, got.latency))
    yield f"{got.tokens:.1f}"
    yield from (f"{v:.2f}" for v in (got.queries, *got.effective))


def gate_table(verdicts: Sequence[Verdict]) -> Table:
    """What was wanted, what came, and whether it holds."""
    rows = [
        (
            v.gate.load,
            _NAMES[v.gate.figure],
            v.gate.wanted,
            "not measured" if v.got is None else f"{v.got:.3f}",
            {True: "holds", False: "DOES NOT HOLD", None: "-"}[v.holds],
        )
        for v in verdicts
    ]
    return Table("Gates", ("load", "figure", "wanted", "got", "result"), rows)


def conditions(**more: object) -> dict[str, object]:
    """What figures depend on."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        **{name: _version(name) for name in _PACKAGES},
        **more,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def save(
    path: Path,
    found: Comparison,
    about: Mapping[str, object],
    verdicts: Sequence[Verdict] = (),
) -> None:
    """Write everything as JSON: conditions, gates, and when each token came, to 0.1 ms."""
    text = json.dumps(
        {
            "conditions": dict(about),
            "rates": found.rates,
            "missing": found.missing,
            "gates": [list(row) for row in gate_table(verdicts).rows],
            "runs": [_run(run) for run in found.runs],
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def load(path: Path) -> tuple[Comparison, dict[str, Any], Table]:
    """Read what :func:`save` wrote: the comparison, the conditions, and the table of gates."""
    found = json.loads(path.read_text())
    runs = [
        Run(
            run["load"],
            run["peer"],
            run["round"],
            run["clients"],
            tuple(Record(prompt, arrived, times) for prompt, arrived, times in run["records"]),
        )
        for run in found["runs"]
    ]
    gate_rows = [tuple(row) for row in found["gates"]]
    table = Table("Gates", gate_table(()).head, gate_rows)
    return Comparison(runs, found["missing"], tuple(found["rates"])), found["conditions"], table


def markdown(path: Path) -> str:
    """The tables of a saved comparison, with their conditions."""
    found, about, wanted = load(path)
    stated = ", ".join(f"{name} {value}" for name, value in about.items())
    shown = [*([wanted] if wanted.rows else []), *tables(found)]
    return "\n".join([f"Conditions: {stated}.\n", *(table.markdown() for table in shown)])


def _run(run: Run) -> dict[str, Any]:
    records = [(r.prompt, round(r.arrived, 4), [round(t, 4) for t in r.times]) for r in run.records]
    named = {"load": run.load, "peer": run.peer, "round": run.round, "clients": run.clients}
    return {**named, "records": records}
