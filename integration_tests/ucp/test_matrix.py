"""Every source goes into every target and comes back bit for bit, as the page of the matrix says.

``CORE_UCP_MATRIX=write pytest integration_tests/ucp/test_matrix.py -m ""`` writes the page anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ucp import matrix_page
from ucp.matrix_cells import COLUMNS, EXACT, REFUSED, WEIGHTS, cells
from ucp.matrix_sources import ROWS, Makers, Row

WRITE = os.environ.get("CORE_UCP_MATRIX") == "write"


@pytest.fixture(scope="module")
def makers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Makers:
    """Makes every checkpoint once."""
    return Makers(tmp_path_factory.mktemp("sources"), lambda: request.getfixturevalue("lab"))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.title, marks=[pytest.mark.nightly] if row.nightly else [])
        for row in ROWS
    ],
)
def test_a_source_goes_into_every_target_and_back(row: Row, makers: Makers, tmp_path: Path) -> None:
    found = cells(row.make(makers), row.settings, tmp_path)
    known = matrix_page.committed()
    if WRITE:
        known[row.title] = found
        matrix_page.write({each.title: known[each.title] for each in ROWS if each.title in known})
    assert found == known[row.title]


def test_the_page_has_every_cell_and_every_reason() -> None:
    known = matrix_page.committed()
    assert matrix_page.render(known) == matrix_page.PAGE.read_text(encoding="utf-8")
    assert list(known) == [row.title for row in ROWS]
    for row in known.values():
        assert list(row) == [column.title for column in COLUMNS]
        for cell in row.values():
            assert cell.kind in (EXACT, WEIGHTS, REFUSED)
            assert cell.notes or cell.kind != REFUSED
