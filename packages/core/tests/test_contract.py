"""Core keeps the contract that it holds plugins against."""

from __future__ import annotations

from core.testing import contract

test_contract = contract.suite("core")
