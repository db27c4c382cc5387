"""A rank that fails says why, and the ranks that wait for it do not wait for ever."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Launch


def test_the_reason_is_told(launch: Launch) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1\n.*a layer failed"):
        launch(str(Path(__file__).with_name("one_rank_fails.py")), 2)
