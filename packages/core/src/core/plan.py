"""The plan: which transforms run at which stage, in which order; checked before anything changes."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, TypeVar

from core.contributions import Stage, Transform
from core.errors import PlanError, closest
from core.plugins import Contributed

if TYPE_CHECKING:
    from core.run import Run

T = TypeVar("T")
Found = Contributed[Transform[Any]]


@dataclass(frozen=True)
class Plan:
    """An ordered tuple of transforms for every stage.

    Example:
        >>> def double(subject, run):
        ...     return subject * 2
        >>> numbers = Stage("numbers")
        >>> plan = Plan.build([Contributed("demo", Transform(stage=numbers, name="double", apply=double))])
        >>> plan.ids
        ['demo.double']
        >>> plan.apply(numbers, 21, run=None)
        42
    """

    stages: Mapping[str, tuple[Found, ...]]

    @classmethod
    def build(cls, transforms: Iterable[Found], order: Sequence[str] = ()) -> Plan:
        """Order transforms by phase, ``after``/``before`` and the user's list.

        Args:
            transforms: what the enabled plugins contribute.
            order: the user's ``enable`` list: plugin names or transform ids.

        Raises:
            PlanError: on equal ids, two claimants of one slot, or a cycle; naming both sides.
        """
        by_stage: defaultdict[str, list[Found]] = defaultdict(list)
        for found in transforms:
            by_stage[found.value.stage.name].append(found)
        return cls({name: _order(found, order) for name, found in sorted(by_stage.items())})

    @property
    def ids(self) -> list[str]:
        """Ids of all transforms, stage by stage, in order."""
        return [found.id for stage in self.stages.values() for found in stage]

    def apply(self, stage: Stage[T], subject: T, run: Run) -> T:
        """Chain the transforms of ``stage`` over ``subject``.

        Raises:
            PlanError: when a transform returns ``None``, or was applied to this subject before.
            Exception: whatever a transform raises, with a note naming it.
        """
        for found in self.stages.get(stage.name, ()):
            _refuse_twice(stage, subject, found)
            try:
                changed = found.value.apply(subject, run)
            except Exception as error:
                error.add_note(f"in transform {found.id!r} of stage {stage.name!r}")
                raise
            if changed is None:
                raise PlanError(
                    f"transform {found.id!r} returned None", fix=f"it must return the {stage.name}"
                )
            _remember(stage, subject, changed, found)
            subject = changed
        return subject

    def describe(self) -> list[dict[str, Any]]:
        """The plan as JSON values, as written beside every checkpoint."""
        return [
            {
                "stage": stage,
                "id": found.id,
                "phase": found.value.phase.name,
                "claims": sorted(found.value.claims),
            }
            for stage, chain in self.stages.items()
            for found in chain
        ]


def _order(found: list[Found], order: Sequence[str]) -> tuple[Found, ...]:
    _refuse_equal_ids(found)
    _refuse_shared_claims(found)
    by_id = {item.id: item for item in found}
    position = {item.id: _position(item, order) for item in found}
    graph: dict[str, set[str]] = {id: set() for id in by_id}
    for item in found:
        for name in _resolve(item.value.after, by_id):
            graph[item.id].add(name)
        for name in _resolve(item.value.before, by_id):
            graph[name].add(item.id)
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise PlanError(
            f"these transforms wait for each other: {circle}", fix="drop one after/before"
        ) from None
    ordered: list[Found] = []
    ready: set[str] = set()
    while sorter.is_active():
        ready |= set(sorter.get_ready())
        id = min(ready, key=lambda id: (by_id[id].value.phase, position[id], id))
        ready.remove(id)
        ordered.append(by_id[id])
        sorter.done(id)
    return tuple(ordered)


def _position(found: Found, order: Sequence[str]) -> int:
    for name in (found.id, found.plugin):
        if name in order:
            return order.index(name)
    return len(order)


def _resolve(names: Iterable[str], by_id: Mapping[str, Found]) -> list[str]:
    """Map ids and unique short names to ids; names that are not in the plan are ignored."""
    found: list[str] = []
    for name in names:
        if name in by_id:
            found.append(name)
            continue
        same = sorted(id for id, item in by_id.items() if item.value.name == name)
        if len(same) > 1:
            raise PlanError(f"the name {name!r} means {' and '.join(same)}", fix="use the full id")
        found += same
    return found


def _refuse_equal_ids(found: list[Found]) -> None:
    twice = [id for id, count in Counter(item.id for item in found).items() if count > 1]
    if twice:
        raise PlanError(f"two transforms are called {twice[0]!r}", fix="rename one in its plugin")


def _refuse_shared_claims(found: list[Found]) -> None:
    claimants: defaultdict[str, list[str]] = defaultdict(list)
    for item in found:
        for slot in item.value.claims:
            claimants[slot].append(item.id)
    for slot, ids in sorted(claimants.items()):
        if len(ids) > 1:
            both = " and ".join(sorted(ids))
            raise PlanError(f"{both} both replace {slot!r}", fix="enable only one")


def select(transforms: Iterable[Found], enabled: Sequence[str]) -> list[Found]:
    """Keep the transforms that the user's list names by plugin or by id.

    Raises:
        PlanError: for an id that its plugin does not offer.
    """
    everything = list(transforms)
    ids = [item.id for item in everything]
    for name in enabled:
        if "." in name and name not in ids:
            raise PlanError(f"no transform {name!r}" + closest(name, ids), fix="see `core plan`")
    return [item for item in everything if item.plugin in enabled or item.id in enabled]


# What was applied to which subject: keyed by identity, forgotten with the subject.
_applied: dict[tuple[str, int], list[str]] = {}


def _refuse_twice(stage: Stage[Any], subject: object, found: Found) -> None:
    if stage.once and found.id in _applied.get((stage.name, id(subject)), ()):
        raise PlanError(
            f"transform {found.id!r} was already applied to this {stage.name}",
            fix="build the subject anew, or apply the stage once",
        )


def _remember(stage: Stage[Any], old: object, new: object, found: Found) -> None:
    """Note it for the subject and for its replacement, which may wrap the changed subject."""
    done = [*_applied.get((stage.name, id(old)), ()), found.id]
    for subject in (old, new):
        key = (stage.name, id(subject))
        try:
            if key not in _applied:
                weakref.finalize(subject, _applied.pop, key, None)
        except TypeError:
            continue
        _applied[key] = done
