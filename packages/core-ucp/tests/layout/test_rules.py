"""Exactly one rule counts for every parameter; everything else is an error that names both sides."""

from __future__ import annotations

import pytest
import torch

from core.errors import CheckpointError
from core_ucp.layout.layouts import Alias, Average, Replicate, Shard
from core_ucp.layout.lenses import Rename, Transpose
from core_ucp.layout.names import Pattern
from core_ucp.layout.rules import Rule, Rules

COLUMN, ROW = Shard(0, "tp"), Shard(1, "tp")
NAMES = ["embed.weight", "layers.0.up.weight", "layers.0.down.weight", "layers.10.up.weight"]


def test_every_parameter_has_its_rule() -> None:
    rules = Rules(
        (
            Rule("embed.weight", Replicate(), dtype=torch.bfloat16),
            Rule("layers.{n}.up.weight", COLUMN),
            Rule(r"layers\.\d+\.down\.weight", ROW, regex=True),
        )
    )
    found = rules.assign(NAMES)
    assert [found[name].layout for name in NAMES] == [Replicate(), COLUMN, ROW, COLUMN]
    assert found["embed.weight"].dtype is torch.bfloat16


def test_an_unknown_parameter_names_the_closest_rule() -> None:
    rules = Rules((Rule("embed.weight"), Rule("layers.*.up.weight", COLUMN)), origin="r.toml")
    with pytest.raises(CheckpointError) as caught:
        rules.assign(["layers.0.upp.weight"])
    assert "no rule of r.toml is for layers.0.upp.weight" in str(caught.value)
    assert "the closest rule is 'layers.*.up.weight'" in str(caught.value)
    with pytest.raises(CheckpointError, match="there is none at all"):
        Rules(()).find("x")


def test_a_rule_that_counts_for_nothing_names_the_closest_parameter() -> None:
    rules = (Rule("**"), Rule("layers.*.dwon.weight", ROW, precedence=-1))
    with pytest.raises(CheckpointError) as caught:
        Rules(rules).assign(NAMES)
    assert "'layers.*.dwon.weight' of the rules counts for no parameter" in str(caught.value)
    assert "the closest name is 'layers.0.down.weight'" in str(caught.value)
    allowed = Rule("layers.*.dwon.weight", ROW, optional=True)
    assert len(Rules((Rule("**"), allowed)).assign(NAMES)) == len(NAMES)


def test_two_rules_for_one_parameter_are_both_named() -> None:
    rules = Rules((Rule("layers.**", COLUMN), Rule("**.weight", ROW)))
    with pytest.raises(CheckpointError, match=r"'layers.\*\*' and '\*\*.weight' both match"):
        rules.find("layers.0.up.weight")
    exact = Rules((Rule("layers.**"), Rule("layers.0.up.weight", COLUMN)))
    with pytest.raises(CheckpointError, match="two rules of the rules are for layers.0.up.weight"):
        exact.find("layers.0.up.weight")


def test_precedence_decides_where_it_is_given() -> None:
    rules = Rules((Rule("**", precedence=1), Rule("layers.0.up.weight", COLUMN)))
    assert rules.find("layers.0.up.weight").layout == COLUMN
    assert rules.find("embed.weight").layout == Replicate()


def test_averages_need_permission() -> None:
    rule = Rule("norm.*", Average("tp"))
    with pytest.raises(CheckpointError, match="norm.weight would be averaged") as caught:
        Rules((rule,)).find("norm.weight")
    assert "lossy = true" in str(caught.value)
    assert Rules((rule,), lossy=True).find("norm.weight").lossy


def test_an_alias_is_made_of_the_groups_of_its_name() -> None:
    rule = Rule("{m}.head.weight", Alias("{m}.embed.weight"))
    assert Rules((rule,)).find("actor.head.weight").layout == Alias("actor.embed.weight")
    for of in (Alias("x").divide, Alias("x").undivide, Alias("x").holders):
        with pytest.raises(CheckpointError, match="an alias of x has no elements"):
            of(None)  # type: ignore[arg-type]


def test_lenses_of_rules_come_before_those_of_all() -> None:
    turn, name = Transpose("x"), Rename("x", "y")
    assert Rules((Rule("x", lenses=(turn,)),), (name,)).view_lenses == (turn, name)


@pytest.mark.parametrize(
    ("pattern", "name", "groups"),
    [
        (Pattern("a.*.c"), "a.b.c", {}),
        (Pattern("a.*.c"), "a.b.b.c", None),
        (Pattern("a.**"), "a.b.b.c", {}),
        (Pattern("a.*c"), "a.bc", {}),
        (Pattern("a.{n}.c"), "a.b.c", {"n": "b"}),
        (Pattern("a.{n}.{n}"), "a.b.b", {"n": "b"}),
        (Pattern("a.{n}.{n}"), "a.b.c", None),
        (Pattern("{all**}.w"), "a.b.w", {"all": "a.b"}),
        (Pattern("a+b[0]"), "a+b[0]", {}),
        (Pattern("a.b"), "axb", None),
        (Pattern(r"a\.(?P<n>\d)", regex=True), "a.1", {"n": "1"}),
        (Pattern(r"a\.(?P<n>\d)", regex=True), "a.12", None),
        (Pattern("größe.{n}"), "größe.ü", {"n": "ü"}),
    ],
)
def test_patterns_match_whole_names(
    pattern: Pattern, name: str, groups: dict[str, str] | None
) -> None:
    assert pattern.groups(name) == groups


@pytest.mark.parametrize(("text", "regex"), [("", False), ("(", True), ("(?P<n>a)(?P<n>b)", True)])
def test_what_is_no_pattern_is_refused(text: str, regex: bool) -> None:
    with pytest.raises(CheckpointError):
        Rule(text, regex=regex)
