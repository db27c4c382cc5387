"""Core keeps the contract that it holds plugins against."""

from __future__ import annotations

from core.testing import contract

TYPES = "both checkers look at all of core, not in the tests"

test_contract = contract.suite("core", skip={"static.mypy": TYPES, "static.pyright": TYPES})
