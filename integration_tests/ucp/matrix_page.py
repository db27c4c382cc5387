"""The page of the matrix: written from cells, and read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase

from ucp.matrix_cells import COLUMNS, Cell
from workspace import ROOT

PAGE = ROOT / "docs" / "ucp-matrix.md"
_HEAD = """\
# The matrix of conversions

Every row is a checkpoint that its own framework has written, every column a target of `core convert`. The
tests convert each to each, open what was made, compare it with the source bit for bit, and bring it back
into a universal folder whose digests must be those of the source. Names of parameters stay as they are;
[rules](ucp-layouts.md) bring them into those of another model. Other tests let DeepSpeed, Megatron, torch
and transformers load what was made for them.

exact
: Weights, buffers, moments, steps and hyper-parameters are those of the source.

weights
: So are all weights and buffers, and the format holds nothing else.

refused
: The conversion stops with an error.

A letter in brackets leads to the reason, or to what else is good to know. The columns ZeRO-0 to ZeRO-3 are
`--to deepspeed` for two ranks (stages 0 and 1) or three (stages 2 and 3); `dcp` and `safetensors` are core's
own formats. The page is written by the tests that prove it:

```sh
CORE_UCP_MATRIX=write pytest integration_tests/ucp/test_matrix.py -m ""
```

"""
_NOTES = "\n## Notes\n\n| | |\n|---|---|\n"

Rows = Mapping[str, Mapping[str, Cell]]
"""Cells by title of the row and title of the column."""


def render(rows: Rows) -> str:
    """The whole page."""
    letters: dict[str, str] = {}
    lines = [_line("Source", *(f"`{c.title}`" if c.to == c.title else c.title for c in COLUMNS))]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for title, found in rows.items():
        texts = []
        for column in COLUMNS:
            cell = found[column.title]
            for note in sorted(cell.notes - letters.keys()):
                letters[note] = ascii_lowercase[len(letters)]
            marks = sorted(letters[note] for note in cell.notes)
            texts.append(" ".join([cell.kind, *(f"({mark})" for mark in marks)]))
        lines.append(_line(title, *texts))
    notes = "\n".join(_line(letter, note) for note, letter in letters.items())
    return _HEAD + "\n".join(lines) + "\n" + _NOTES + notes + "\n"


def parse(text: str) -> dict[str, dict[str, Cell]]:
    """The cells of a page; none of an empty one."""
    tables = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    lines = [[part.strip() for part in parts] for parts in tables]
    notes = {parts[0]: parts[1] for parts in lines if len(parts) == 2}
    rows = [parts for parts in lines if len(parts) == len(COLUMNS) + 1][2:]
    return {
        title: {
            column.title: _cell(cell, notes) for column, cell in zip(COLUMNS, cells, strict=True)
        }
        for title, *cells in rows
    }


def committed() -> dict[str, dict[str, Cell]]:
    """The cells of the page in the repository."""
    return parse(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}


def write(rows: Rows, path: Path = PAGE) -> None:
    """Write the page."""
    path.write_text(render(rows), encoding="utf-8")


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str, notes: Mapping[str, str]) -> Cell:
    kind, *letters = text.split()
    return Cell(kind, frozenset(notes[letter.strip("()")] for letter in letters))
