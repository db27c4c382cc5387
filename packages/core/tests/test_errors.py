"""Errors say what, why and what to do, and survive a journey to another process."""

from __future__ import annotations

import pickle

import pytest

import core
from core.errors import CoreError, closest

KINDS = [
    core.PluginError,
    core.PlanError,
    core.SettingsError,
    core.CheckpointError,
    core.EngineError,
    core.ModelError,
    core.DataError,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_pickles_with_its_parts(kind: type[CoreError]) -> None:
    error = kind("what", why="why", fix="fix")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert issubclass(kind, CoreError)
    assert (again.what, again.why, again.fix) == ("what", "why", "fix")


@pytest.mark.parametrize(
    ("why", "fix", "text"),
    [
        ("", "", "what"),
        ("why", "", "what: why"),
        ("", "fix", "what\n  fix: fix"),
        ("why", "fix", "what: why\n  fix: fix"),
    ],
)
def test_an_error_reads_as_a_sentence(why: str, fix: str, text: str) -> None:
    assert str(CoreError("what", why=why, fix=fix)) == text


def test_the_closest_name_is_offered_only_when_it_is_close() -> None:
    assert closest("fp7", ["fp6", "ucp"]) == "; did you mean 'fp6'?"
    assert closest("something", ["fp6", "ucp"]) == ""
    assert closest("fp6", []) == ""
