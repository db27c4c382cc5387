"""One cell of the matrix: convert as users do, open what was made, compare it bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import core
from core.checkpoints import convert
from core.errors import CheckpointError
from core_ucp.execution.checking import diff, digest
from core_ucp.sources.registry import open_checkpoint
from core_ucp.view.keys import MODEL, parse_key, weight_key
from core_ucp.view.view import Atom, View

EXACT, WEIGHTS, REFUSED = "exact", "weights", "refused"
_EXTRA = "random numbers and other tensors beside model and optimizer have no place there"
_TIED = "tied weights are stored under each of their names"
_CONFIGURED = "tied weights are stored once, and the model's configuration ties them again"
_SOME_HYPER = (
    "hyper-parameters are there, but Megatron does not name their parameters: they are told again"
    " for those that fit its rule that biases and vectors do not decay"
)
_TOLD = "`ucp.{}` tells what the source does not"


@dataclass(frozen=True)
class Column:
    """A target.

    Attributes:
        title: what the page calls it.
        to: name of the format.
        settings: of the section ``ucp``.
    """

    title: str
    to: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def _zero(stage: int, ranks: int) -> Column:
    return Column(f"ZeRO-{stage}", "deepspeed", {"stage": stage, "world_size": ranks})


COLUMNS = (
    Column("universal", "universal"),
    Column("torch-dcp", "torch-dcp"),
    Column("dcp", "dcp"),
    Column("safetensors", "safetensors"),
    Column("huggingface", "huggingface"),
    _zero(0, 2),
    _zero(1, 2),
    _zero(2, 3),
    _zero(3, 3),
    Column("megatron", "megatron"),
)
"""All targets, in the order of the page. The first one gives the digests of round trips."""


@dataclass(frozen=True)
class Cell:
    """What became of a source in a target.

    Attributes:
        kind: ``exact``, ``weights`` or ``refused``.
        notes: the reason, or what else a reader should know.
    """

    kind: str
    notes: frozenset[str] = frozenset()


def cells(path: Path, settings: Mapping[str, Any], scratch: Path) -> dict[str, Cell]:
    """Convert a checkpoint to every target, and back to a universal folder.

    Args:
        path: of the checkpoint.
        settings: what DeepSpeed targets of it need to be told.
        scratch: an empty folder.

    Returns:
        cells by title of the column.

    Raises:
        AssertionError: when anything that a target holds differs from the source.
    """
    view = open_checkpoint(path)
    digests: dict[str, str] = {}
    found: dict[str, Cell] = {}
    for column in COLUMNS:
        wanted = {**column.settings, **(settings if column.to == "deepspeed" else {})}
        made = scratch / column.title
        try:
            _convert(path, made, column, wanted)
        except CheckpointError as error:
            found[column.title] = Cell(REFUSED, frozenset([_reason(error, path)]))
            continue
        cell, kept = _compare(view, made, column)
        told = {_TOLD.format(name) for name in wanted if name in settings}
        found[column.title] = dataclasses.replace(cell, notes=cell.notes | told)
        _convert(made, back := scratch / f"{column.title}-back", COLUMNS[0], {})
        again = open_checkpoint(back)
        digests = digests or dict(again.digests)
        lost = [key for key in kept if again.digests.get(key) != digests[key]]
        assert not lost, f"{column.title} and back: {lost}"
    return found


def _convert(source: Path, target: Path, column: Column, settings: Mapping[str, Any]) -> None:
    with core.start(folder=target.parent / "run", quiet=True, ucp=settings) as run:
        convert.execute(convert.plan(source, target, column.to, run))


def _reason(error: CheckpointError, path: Path) -> str:
    text = f"{error.what}: {error.why}" if error.why else error.what
    return text.replace(str(path), "the checkpoint")


def _compare(view: View, path: Path, column: Column) -> tuple[Cell, list[str]]:
    """The cell of a target, and the keys of the source that it holds."""
    made = open_checkpoint(path)
    tied, notes = _without_tied(view, made)
    wanted = dict(view.atoms)
    weights = column.to == "huggingface"
    if weights:
        wanted = {key: atom for key, atom in wanted.items() if key.startswith(MODEL)}
    extra = {key for key in wanted if parse_key(key) is None}
    if extra and not extra & made.atoms.keys():
        wanted = {key: atom for key, atom in wanted.items() if key not in extra}
        notes.append(_EXTRA)
    left, right = (
        dataclasses.replace(each, atoms=atoms) for each, atoms in ((view, wanted), (made, tied))
    )
    problems = [f"{found.key}: {found.problem}" for found in diff(left, right)]
    if not weights:
        problems += _settings(view, made)
        lost = sorted(view.resume.hyper.keys() - made.resume.hyper.keys())
        if lost and made.framework == "megatron":
            notes.append(_SOME_HYPER)
        elif lost:
            problems.append(f"hyper-parameters of {lost[0]} and {len(lost) - 1} others are lost")
    assert not problems, f"{column.title}: {problems}"
    kind = WEIGHTS if weights and len(wanted) < len(view.atoms) else EXACT
    return Cell(kind, frozenset(notes)), list(wanted)


def _without_tied(view: View, made: View) -> tuple[dict[str, Atom], list[str]]:
    """Tensors of a target but for those that it has once more under another name."""
    atoms, notes = dict(made.atoms), list[str]()
    for alias, owner in view.aliases.items():
        again = atoms.pop(weight_key(alias), None)
        if again is not None:
            assert digest(made, again) == digest(made, atoms[weight_key(owner)])
            notes = [_TIED]
        elif alias not in made.aliases:
            notes = [_CONFIGURED]
    return atoms, notes


def _settings(view: View, made: View) -> Iterator[str]:
    """Steps and hyper-parameters that both know and that differ."""
    if view.resume.step is not None and made.resume.step != view.resume.step:
        yield f"step {view.resume.step} and {made.resume.step}"
    for name in ("scheduler", "scaler", "counters"):
        one, other = getattr(view.resume, name), getattr(made.resume, name)
        for key in one.keys() & other.keys():
            if _plain(one[key]) != _plain(other[key]):
                yield f"{key} of the {name}: {one[key]} and {other[key]}"
    for name, hyper in view.resume.hyper.items():
        other = made.resume.hyper.get(name, {})
        for key in hyper.keys() & other.keys():
            if _plain(hyper[key]) != _plain(other[key]):
                yield f"{key} of {name}: {hyper[key]} and {other[key]}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
