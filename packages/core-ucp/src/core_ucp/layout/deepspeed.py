"""Rules from what DeepSpeed writes beside its checkpoints: ``universal_checkpoint_info``.

The keys and their meaning are those of ``deepspeed/checkpoint/{constants,ds_to_universal}.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import CheckpointError
from core_ucp.layout.holders import Average, Chain, Refused, Replicate, steps
from core_ucp.layout.layout import Layout
from core_ucp.layout.layouts import Expert, Fused, Pad, Segment, Shard
from core_ucp.layout.mesh import Mesh
from core_ucp.layout.rules import Rule, Rules

REPLICATED = "tp_replicated_parameter_patterns"
AVERAGED = "parameter_to_average_patterns"
HALVES = "parameter_with_2_sub_params_cat_dim_0"
PARTS = "parameter_with_sub_params"
WIDTHS = "sub_param_shard_widths"
ROWS = "parameter_with_row_parallelism_patterns"
VOCABULARY = "vocabulary_parameter_patterns"
UNSUPPORTED = "autotp_unsupported_parameter_patterns"
EXPERTS = "expert_parameter_patterns"
VERSION = "universal_checkpoint_version"
VOCABULARY_SIZE = "original_vocab_size"

_WITH_WIDTHS = 0.4
"""Version from which on the widths of every rank's sub-parameters are recorded."""


@dataclass(frozen=True)
class _Entry:
    """A pattern of one of DeepSpeed's lists, in the order in which it consults them."""

    pattern: str
    layout: Layout
    paper: str
    precedence: int
    optional: bool = False


def from_deepspeed(
    info: Mapping[str, Any], mesh: Mesh, *, axis: str = "tp", lossy: bool = False
) -> Rules:
    """How DeepSpeed's parameters lie over tensor-parallel ranks.

    DeepSpeed consults its lists in a fixed order, cuts everything else along dimension 0, and
    matches patterns at the beginning of names. Which pipeline stage owns a parameter is told by
    the files it is in, so ``pipeline_replicated_parameter_patterns`` make no rule here.

    Args:
        info: the dictionary ``universal_checkpoint_info`` of plain values.
        mesh: with the tensor-parallel axis, and ``ep`` where experts are cut.
        axis: name of the tensor-parallel axis.
        lossy: whether parameters may be averaged.

    Raises:
        CheckpointError: when the dictionary contradicts itself or the mesh.
    """
    ranks = mesh.size(axis)
    entries = list(_entries(info, mesh, axis, ranks))
    vocabulary = _texts(info, VOCABULARY)
    rows = _vocabulary_size(info) if vocabulary else 0
    rules = [_rule(entry) for entry in entries]
    claimed: set[str] = set()
    for pattern in vocabulary:
        for entry in entries:
            both = _both(pattern, entry, rows)
            if both is not None:
                rules.append(both)
                claimed.add(pattern)
        default = Chain((_padded(rows), Shard(0, axis, "stored")))
        found = pattern in claimed
        rules.append(_rule(_Entry(pattern, default, "vocabulary", 16, optional=found)))
    rest = Rule("**", Shard(0, axis, "stored"), paper="unique_params", optional=True, precedence=18)
    return Rules((*rules, rest), mesh=mesh, lossy=lossy, origin="the patterns of DeepSpeed")


def _entries(info: Mapping[str, Any], mesh: Mesh, axis: str, ranks: int) -> Iterator[_Entry]:
    for pattern, reason in _table(info, UNSUPPORTED).items():
        yield _Entry(pattern, Refused(str(reason)), "", 2, optional=True)
    if "ep" in mesh.axes:
        for pattern in _texts(info, EXPERTS):
            yield _Entry(pattern, Expert(0, "ep"), "fragment_params", 2)
    for pattern in _texts(info, REPLICATED):
        yield _Entry(pattern, Replicate(), "replicated_params", 4)
    for pattern in _texts(info, AVERAGED):
        yield _Entry(pattern, Average(axis), "params_to_average", 6)
    for pattern in _texts(info, HALVES):
        yield _Entry(pattern, Fused(0, axis, (Segment(sizes="stored"),) * 2), "fragment_params", 8)
    described_parts = info.get(PARTS) or []
    if not isinstance(described_parts, Sequence):
        raise CheckpointError(f"{PARTS} of DeepSpeed is {described_parts!r}", why="it is no list")
    for described in described_parts:
        yield from _fused(described, info, axis, ranks)
    for pattern in _texts(info, ROWS):
        yield _Entry(pattern, Shard(1, axis, "stored"), "fragment_params", 12)


def _fused(described: Any, info: Mapping[str, Any], axis: str, ranks: int) -> Iterator[_Entry]:
    """Sub-parameters, from a ``SubparamShape`` or its fields in a dictionary."""
    patterns, spec, dim = _described(described)
    for pattern in patterns:
        if _version(info) >= _WITH_WIDTHS:
            segments = _recorded(pattern, spec, info, ranks)
        elif isinstance(spec, int):
            segments = (Segment(sizes="stored"),) * _positive(spec, pattern)
        else:
            segments = tuple(Segment(_even(width, ranks, pattern)) for width in spec)
        yield _Entry(pattern, Fused(dim, axis, segments), "fragment_params", 10)


def _described(described: Any) -> tuple[list[str], int | Sequence[int], int]:
    """Patterns, the widths or the number of sub-parameters, and the dimension they are along."""
    fields = described if isinstance(described, Mapping) else getattr(described, "__dict__", {})
    shape: Any = fields.get("shape")
    dim: Any = fields.get("partition_dim")
    readable = isinstance(shape, Sequence) and isinstance(dim, int) and 0 <= dim < len(shape)
    if not readable or not (isinstance(shape[dim], int) or _numbers(shape[dim])):
        raise CheckpointError(f"{PARTS} of DeepSpeed cannot be read", why=f"it has {described!r}")
    return _texts(fields, "patterns"), shape[dim], dim


def _recorded(pattern: str, spec: Any, info: Mapping[str, Any], ranks: int) -> tuple[Segment, ...]:
    widths = _table(info, WIDTHS).get(pattern)
    if widths is None:
        raise CheckpointError(
            f"DeepSpeed records no {WIDTHS} of {pattern!r}",
            why=f"version {_version(info)} of its dictionary should have them",
        )
    right = isinstance(widths, Sequence) and all(
        _numbers(each) and len(each) == ranks for each in widths
    )
    if not right or not _numbers(spec) or [sum(each) for each in widths] != list(spec):
        raise CheckpointError(
            f"DeepSpeed's {WIDTHS} of {pattern!r} are {widths}",
            why=f"they should be those of {ranks} ranks, and add up to {spec}",
        )
    return tuple(Segment(sum(each), sizes=tuple(each)) for each in widths)


def _even(width: int, ranks: int, pattern: str) -> int:
    if width % ranks:
        raise CheckpointError(
            f"a sub-parameter of {pattern!r} is {width} wide, which {ranks} ranks do not share",
            why=f"DeepSpeed records how they do from version {_WITH_WIDTHS} on",
            fix="write the rule by hand, with the sizes of every rank",
        )
    return width


def _positive(count: int, pattern: str) -> int:
    if not 0 < count <= 1024:
        raise CheckpointError(f"{pattern!r} is said to have {count} sub-parameters")
    return count


def _both(pattern: str, entry: _Entry, rows: int) -> Rule | None:
    """The rule of names in the vocabulary that another list has as well, where there can be any."""
    exact = _exact(entry.pattern)
    if exact is not None and re.match(pattern, exact) is None:
        return None
    if _exact(pattern) is not None and re.match(entry.pattern, _exact(pattern) or "") is None:
        return None
    layout = entry.layout
    if not isinstance(layout, Refused):
        layout = Chain((_padded(rows), *steps(layout)))
    text = f"(?={pattern})(?:{entry.pattern})(?s:.*)"
    return Rule(
        text, layout, True, paper="vocabulary", optional=True, precedence=entry.precedence - 1
    )


def _padded(rows: int) -> Pad:
    return Pad(0, size="stored", unpadded=rows)


def _rule(entry: _Entry) -> Rule:
    exact = _exact(entry.pattern)
    text = f"(?:{entry.pattern})(?s:.*)" if exact is None else exact
    return Rule(
        text,
        entry.layout,
        exact is None,
        paper=entry.paper,
        optional=entry.optional,
        precedence=entry.precedence,
    )


def _exact(pattern: str) -> str | None:
    """The only name that a pattern like ``^layers\\.0\\.weight$`` matches."""
    name = pattern.removeprefix("^").removesuffix("$").replace("\\", "")
    if pattern != f"^{re.escape(name)}$" or "*" in name or "{" in name:
        return None
    return name


def _texts(info: Mapping[str, Any], key: str) -> list[str]:
    values = info.get(key) or []
    right = isinstance(values, Sequence) and not isinstance(values, str)
    if not right or not all(isinstance(value, str) for value in values):
        raise CheckpointError(
            f"{key} of DeepSpeed is {values!r}", why="it should be a list of texts"
        )
    return list(values)


def _table(info: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = info.get(key) or {}
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{key} of DeepSpeed is {table!r}", why="it should be a dictionary")
    return table


def _numbers(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and all(isinstance(value, int) and value >= 0 for value in values)
    )


def _version(info: Mapping[str, Any]) -> float:
    version = info.get(VERSION, 0.0)
    if not isinstance(version, (int, float)):
        raise CheckpointError(f"{VERSION} of DeepSpeed is {version!r}", why="it should be a number")
    return float(version)


def _vocabulary_size(info: Mapping[str, Any]) -> int:
    size = info.get(VOCABULARY_SIZE)
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(
            f"{VOCABULARY_SIZE} of DeepSpeed is {size!r}",
            why=f"{VOCABULARY} cannot be told from padding without it",
        )
    return size
