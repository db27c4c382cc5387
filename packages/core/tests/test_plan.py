"""Plans: one order for one set of transforms, conflicts named, and no transform applied twice."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, strategies as st

from core.contributions import Phase, Stage, Transform
from core.errors import PlanError
from core.plan import Found, Plan, select
from core.plugins import Contributed

STAGE: Stage[Any] = Stage("subject")
OTHER: Stage[Any] = Stage("other")
RUN: Any = None


class Subject(list[str]):
    """A list that can be referred to weakly, like a module."""


def same(subject: Any, run: Any) -> Any:
    return subject


def transform(id: str, apply: Callable[[Any, Any], Any] = same, **more: Any) -> Found:
    plugin, _, name = id.partition(".")
    more.setdefault("stage", STAGE)
    return Contributed(plugin, Transform(name=name or "t", apply=apply, **more))


def order(*found: Found, listed: Sequence[str] = ()) -> list[str]:
    return Plan.build(found, listed).ids


@st.composite
def graphs(draw: st.DrawFn) -> list[Found]:
    """Transforms with ``after``/``before`` that follow a hidden order, so there is no circle."""
    count = draw(st.integers(1, 9))
    hidden = draw(st.permutations([f"p{index}.t" for index in range(count)]))
    found = []
    for index, id in enumerate(hidden):
        after = draw(st.lists(st.sampled_from(hidden[:index] or ["absent.t"]), max_size=3))
        before = draw(st.lists(st.sampled_from(hidden[index + 1 :] or ["absent.t"]), max_size=3))
        phase = draw(st.sampled_from(Phase))
        found.append(transform(id, phase=phase, after=tuple(after), before=tuple(before)))
    return found


@given(st.data())
def test_the_order_keeps_every_rule_and_not_that_of_the_input(data: st.DataObject) -> None:
    found = data.draw(graphs())
    listed = data.draw(st.lists(st.sampled_from([item.plugin for item in found]), unique=True))
    ids = order(*found, listed=listed)
    place = {id: index for index, id in enumerate(ids)}
    assert sorted(ids) == sorted(item.id for item in found)
    for item in found:
        assert all(place[id] < place[item.id] for id in item.value.after if id in place)
        assert all(place[item.id] < place[id] for id in item.value.before if id in place)
    assert order(*data.draw(st.permutations(found)), listed=listed) == ids


@given(st.lists(st.sampled_from(Phase), min_size=1, max_size=9))
def test_strangers_run_by_phase(phases: list[Phase]) -> None:
    found = [transform(f"p{index}.t", phase=phase) for index, phase in enumerate(phases)]
    chain = Plan.build(found).stages["subject"]
    assert [item.value.phase for item in chain] == sorted(phases)


def test_equals_run_in_the_users_order_and_then_by_id() -> None:
    found = [transform(f"{name}.t") for name in ("a", "b", "c", "d")]
    assert order(*found) == ["a.t", "b.t", "c.t", "d.t"]
    assert order(*found, listed=["d", "b.t"]) == ["d.t", "b.t", "a.t", "c.t"]


def test_phases_come_before_the_users_order_and_rules_before_phases() -> None:
    late = transform("a.t", phase=Phase.COMPILE)
    assert order(late, transform("b.t"), listed=["a", "b"]) == ["b.t", "a.t"]
    early = transform("b.t", after=("a.t",))
    assert order(late, early) == ["a.t", "b.t"]


def test_stages_are_planned_apart() -> None:
    plan = Plan.build([transform("a.t", stage=OTHER), transform("b.t", before=("a.t",))])
    assert {stage: [found.id for found in chain] for stage, chain in plan.stages.items()} == {
        "other": ["a.t"],
        "subject": ["b.t"],
    }


def test_short_names_are_accepted_where_unique() -> None:
    a, b = transform("a.linear", after=("chunk",)), transform("b.chunk")
    assert order(a, b) == ["b.chunk", "a.linear"]
    with pytest.raises(PlanError, match=r"the name 'chunk' means b\.chunk and c\.chunk"):
        order(a, transform("c.chunk"), b)


def test_rules_about_what_is_absent_are_ignored() -> None:
    assert order(transform("a.t", after=("b.t", "x"), before=("y",))) == ["a.t"]


def test_two_claimants_are_both_named_whatever_their_order() -> None:
    a, b = (transform(f"{n}.attn", claims=frozenset({"attention", n})) for n in "ab")
    for found in ([a, b], [b, a]):
        with pytest.raises(PlanError) as refused:
            Plan.build(found)
        assert refused.value.what == "a.attn and b.attn both replace 'attention'"
        assert refused.value.fix == "enable only one"


def test_a_slot_may_be_claimed_once_at_every_stage() -> None:
    claims = frozenset({"attention"})
    found = [transform("a.t", claims=claims), transform("b.t", claims=claims, stage=OTHER)]
    assert len(Plan.build(found).ids) == 2


def test_two_transforms_of_one_id_are_refused() -> None:
    with pytest.raises(PlanError, match=r"two transforms are called 'a\.t'"):
        order(transform("a.t"), transform("a.t"))


def test_a_circle_is_printed() -> None:
    found = [
        transform("a.t", after=("c.t",)),
        transform("b.t", after=("a.t",)),
        transform("c.t", after=("b.t",)),
        transform("d.t"),
    ]
    with pytest.raises(PlanError) as refused:
        order(*found)
    circle = refused.value.what.partition(": ")[2].split(" -> ")
    assert circle[0] == circle[-1]
    assert sorted(circle[1:]) == ["a.t", "b.t", "c.t"]
    follows = {"a.t": "b.t", "b.t": "c.t", "c.t": "a.t"}
    ahead = all(follows[x] == y for x, y in pairwise(circle))
    back = all(follows[y] == x for x, y in pairwise(circle))
    assert ahead or back


def test_a_transform_cannot_follow_itself() -> None:
    with pytest.raises(PlanError, match=r"a\.t -> a\.t"):
        order(transform("a.t", after=("a.t",)))


def adds(text: str) -> Callable[[Any, Any], Any]:
    def apply(subject: Any, run: Any) -> Any:
        return Subject([*subject, text])

    return apply


def test_transforms_are_chained_in_order_and_other_stages_left_alone() -> None:
    chain = [transform("a.t", adds("a")), transform("b.t", adds("b"), before=("a.t",))]
    plan = Plan.build([*chain, transform("c.t", adds("c"), stage=OTHER)])
    assert plan.apply(STAGE, Subject(), RUN) == ["b", "a"]
    assert plan.apply(Stage("third"), [], RUN) == []


def test_none_is_refused_with_the_transforms_name() -> None:
    plan = Plan.build([transform("a.t", lambda subject, run: None)])
    with pytest.raises(PlanError) as refused:
        plan.apply(STAGE, Subject(), RUN)
    assert str(refused.value) == (
        "transform 'a.t' returned None\n  fix: it must return the subject"
    )


def test_an_error_carries_the_transforms_name() -> None:
    plan = Plan.build([transform("a.t", lambda subject, run: subject.missing)])
    with pytest.raises(AttributeError) as failed:
        plan.apply(STAGE, Subject(), RUN)
    assert failed.value.__notes__ == ["in transform 'a.t' of stage 'subject'"]


@pytest.mark.parametrize("apply", [same, adds("a")], ids=["in place", "replaced"])
def test_a_second_application_is_refused_before_anything_changes(
    apply: Callable[[Any, Any], Any],
) -> None:
    plan = Plan.build([transform("a.t", apply), transform("b.t", apply)])
    once = plan.apply(STAGE, Subject(), RUN)
    before = list(once)
    with pytest.raises(PlanError, match=r"'a\.t' was already applied to this subject"):
        plan.apply(STAGE, once, RUN)
    assert once == before
    with pytest.raises(PlanError, match="already applied"):
        Plan.build([transform("b.t", apply)]).apply(STAGE, once, RUN)


def test_what_else_was_applied_is_no_obstacle() -> None:
    once = Plan.build([transform("a.t")]).apply(STAGE, Subject(), RUN)
    assert Plan.build([transform("b.t")]).apply(STAGE, once, RUN) is once
    assert Plan.build([transform("a.t", stage=OTHER)]).apply(OTHER, once, RUN) is once


def test_memory_of_a_subject_goes_with_it() -> None:
    plan = Plan.build([transform("a.t")])
    for _ in range(200):  # new subjects get the addresses of old ones
        plan.apply(STAGE, Subject(), RUN)
        gc.collect(0)
    plan.apply(STAGE, copy.copy(plan.apply(STAGE, Subject(), RUN)), RUN)


def test_batches_have_no_memory() -> None:
    plan = Plan.build([transform("a.t")])
    batch: dict[str, int] = {}
    assert plan.apply(STAGE, plan.apply(STAGE, batch, RUN), RUN) is batch


def test_the_users_list_selects_plugins_and_single_transforms() -> None:
    found = [transform("a.x"), transform("a.y"), transform("b.x")]
    ids = lambda *listed: [item.id for item in select(found, listed)]  # noqa: E731
    assert ids() == []
    assert ids("a") == ["a.x", "a.y"]
    assert ids("a.y", "b") == ["a.y", "b.x"]
    with pytest.raises(PlanError, match=r"no transform 'a\.z'; did you mean 'a\.[xy]'"):
        ids("a.z")


def test_a_plan_is_described_in_json_values() -> None:
    claims = frozenset({"mlp", "linear"})
    plan = Plan.build([transform("a.t", phase=Phase.PRECISION, claims=claims)])
    assert plan.describe() == [
        {"stage": "subject", "id": "a.t", "phase": "PRECISION", "claims": ["linear", "mlp"]}
    ]


def test_transforms_pickle() -> None:
    found = transform("a.t", claims=frozenset({"mlp"}), after=("b.t",))
    assert pickle.loads(pickle.dumps(found)) == found
