"""Tables keep their columns whatever is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.cli.table import as_text, echo_json, echo_table


def test_columns_are_as_wide_as_their_widest_cell(capsys: pytest.CaptureFixture[str]) -> None:
    echo_table(("A", "LONGER", "C"), [("first", "x", "one"), ("y", "second one", "two")])
    assert capsys.readouterr().out.splitlines() == [
        "A      LONGER      C",
        "first  x           one",
        "y      second one  two",
    ]


def test_the_last_column_wraps_below_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    echo_table(("NAME", "REASON"), [("demo", "word " * 40)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert all(len(line) <= 72 for line in lines)
    assert all(line.startswith(" " * 6) for line in lines[2:])


def test_a_table_without_rows_has_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    echo_table(("A", "B"), [])
    echo_table(("A", "B"), [("", "")])
    assert capsys.readouterr().out.splitlines() == ["A  B", "A  B", ""]


def test_json_takes_paths(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"path": Path("a/b")})
    assert json.loads(capsys.readouterr().out) == {"path": "a/b"}


def test_json_has_no_numbers_that_are_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"a": [float("nan"), 1.5], "b": (float("inf"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None]}


def test_plain_values_in_one_line() -> None:
    assert as_text({"dp": 4, "tp": 2}) == "dp 4, tp 2"
    assert as_text(["one", ("two", 3)]) == "one; two; 3"
    assert [as_text(value) for value in ({}, [], None, "")] == ["-"] * 4
    assert [as_text(value) for value in (1234567, 0, True, 0.5)] == [
        "1,234,567",
        "0",
        "True",
        "0.5",
    ]
