"""The plugin keeps the contract of core's plugins; `core check --list` says what that is."""

from core.testing import contract

test_contract = contract.suite("fpdt")
