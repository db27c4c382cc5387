"""``oneOf`` becomes ``anyOf`` only where no value could tell the difference."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings, strategies as st

from core_splitfuse.serving.structured.unions import MOST_PARTS, plain_unions

scalars = st.sampled_from([0, 1, 1.0, True, False, None, "a", "b", 1.5, "1"])
values = st.recursive(
    scalars,
    lambda inner: (
        st.dictionaries(st.sampled_from("kt"), inner, max_size=2) | st.lists(inner, max_size=2)
    ),
    max_leaves=4,
)
types = st.sampled_from(["object", "integer", "number", "string", "null", "boolean", "array"])
leaf = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"const": scalars}),
    st.fixed_dictionaries({"enum": st.lists(scalars, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"type": types | st.lists(types, min_size=1, max_size=2, unique=True)}),
)
tagged = st.fixed_dictionaries(
    {"properties": st.dictionaries(st.sampled_from("kt"), leaf, min_size=1, max_size=2)},
    optional={
        "type": st.just("object"),
        "required": st.lists(st.sampled_from("kt"), max_size=2, unique=True),
    },
)
references = st.sampled_from([{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}])
parts = st.lists(leaf | tagged | references, min_size=1, max_size=3)


@settings(max_examples=500)
@given(one_of=parts, x=leaf | tagged, y=leaf | tagged, value=values)
def test_the_same_values_fit(
    one_of: list[Any], x: dict[str, Any], y: dict[str, Any], value: Any
) -> None:
    schema = {"oneOf": one_of, "$defs": {"x": x, "y": y}}
    plain = plain_unions(schema)
    before, after = (jsonschema.Draft202012Validator(made) for made in (schema, plain))
    assert before.is_valid(value) == after.is_valid(value)


def tag(kind: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"k": {"const": kind}}, "required": ["k"]}


@pytest.mark.parametrize(
    ("parts", "told_apart"),
    [
        ([{"type": "string"}, {"type": "null"}], True),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], True),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], False),
        ([{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/nothing"}], False),
        ([{"type": "integer"}, {"type": "number"}], False),
        ([tag("a"), {"type": "object"}], False),
        ([{"const": number} for number in range(MOST_PARTS + 1)], False),
    ],
)
def test_parts_are_told_apart_by_types_and_tags(parts: list[Any], told_apart: bool) -> None:
    made = plain_unions({"items": {"oneOf": parts}, "$defs": {"a": tag("a"), "b": tag("b")}})
    assert ("anyOf" in made["items"]) == told_apart
