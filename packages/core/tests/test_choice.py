"""Choosing one contribution: by name, or the preferred one that works, with the reason in words."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, strategies as st

from core.choice import choose
from core.errors import PluginError
from core.plugins import Contributed


@dataclass(frozen=True)
class Thing:
    name: str
    preference: int | None = None
    wrong: str = ""


def objection(thing: Thing) -> str:
    return thing.wrong


def things(*given: tuple[str, Thing]) -> list[Contributed[Thing]]:
    return [Contributed(plugin, thing) for plugin, thing in given]


FAST = ("demo", Thing("fast", 10))
PLAIN = ("core", Thing("plain", 0))
NEVER = ("demo", Thing("asked", None))


def test_auto_takes_the_highest_preference() -> None:
    choice = choose("writer", "auto", things(PLAIN, FAST, NEVER), objection)
    assert (choice.value, choice.plugin, choice.why) == (FAST[1], "demo", "the preferred one")


def test_auto_says_why_a_better_one_was_passed_over() -> None:
    slow = ("demo", Thing("fast", 10, wrong="no direct I/O on tmpfs"))
    choice = choose("writer", "auto", things(slow, PLAIN), objection)
    assert choice.value.name == "plain"
    assert choice.why == "the preferred one that works (demo.fast: no direct I/O on tmpfs)"


def test_nothing_that_works_is_an_error_with_every_reason() -> None:
    bad = things(("a", Thing("x", 1, "too old")), ("b", Thing("y", 2, "too new")))
    with pytest.raises(PluginError) as refused:
        choose("writer", "auto", bad, objection)
    assert str(refused.value) == "no writer works here: b.y: too new; a.x: too old"
    with pytest.raises(PluginError, match="none is installed"):
        choose("writer", "auto", things(NEVER), objection)


@pytest.mark.parametrize("name", ["asked", "demo.asked"])
def test_a_name_or_an_id_is_taken_whatever_its_preference(name: str) -> None:
    choice = choose("writer", name, things(FAST, NEVER), objection)
    assert (choice.value.name, choice.why) == ("asked", "named in the settings")


def test_a_named_one_that_does_not_work_is_refused_with_its_reason() -> None:
    bad = things(("demo", Thing("fast", 10, "no GPU")), PLAIN)
    with pytest.raises(PluginError, match="writer 'fast' cannot be used: no GPU"):
        choose("writer", "fast", bad, objection)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(PluginError) as refused:
        choose("writer", "fats", things(FAST, PLAIN), objection)
    assert "no writer 'fats': known: fast, plain; did you mean 'fast'?" in str(refused.value)


def test_a_name_that_two_plugins_offer_needs_the_id() -> None:
    both = things(("a", Thing("fast")), ("b", Thing("fast")))
    with pytest.raises(PluginError, match=r"the writer 'fast' is offered by a\.fast and b\.fast"):
        choose("writer", "fast", both, objection)
    assert choose("writer", "b.fast", both, objection).plugin == "b"


@given(st.permutations([("a", 5), ("b", 5), ("c", 9), ("d", 9), ("e", 1)]))
def test_the_choice_does_not_depend_on_the_order(order: list[tuple[str, int]]) -> None:
    found = things(*((name, Thing("t", preference)) for name, preference in order))
    assert choose("writer", "auto", found, objection).plugin == "c"
