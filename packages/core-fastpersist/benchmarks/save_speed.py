"""Durable saves and cold loads of one state, every way in turn, as ratios of one run.

The methods are interleaved and shuffled anew for each repetition; an fsync is part of every save::

    python packages/core-fastpersist/benchmarks/save_speed.py --repeats 6
    python packages/core-fastpersist/benchmarks/save_speed.py --json speed.json --plot speed.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from core.cli.table import echo_table
from core_fastpersist.bench.report import plot, run


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=float, default=1e9, help="Bytes of the state.")
    parser.add_argument("--repeats", type=int, default=4, help="Interleaved repetitions.")
    parser.add_argument("--folder", type=Path, default=Path(), help="On the disk in question.")
    parser.add_argument("--seed", type=int, default=0, help="Of the state and of the order.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the figures there.")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="Draw a bar chart there.")
    given = parser.parse_args()
    report = run(given.folder, int(given.size), given.repeats, seed=given.seed, tell=tell)
    for key, value in report.conditions.items():
        print(f"{key}: {value}")
    for head, rows in report.tables():
        print()
        echo_table(head, rows)
    if given.json:
        given.json.write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(report, given.plot)


def tell(text: str) -> None:
    """Say on standard error what runs."""
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
