"""Every way to ask for a form of the answer, and what is refused before a model runs."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from core.errors import EngineError
from core_splitfuse.serving.structured import Grammars, read_wanted
from core_splitfuse.serving.structured.wanted import (
    DEEPEST,
    MOST_BYTES,
    MOST_CHOICES,
    MOST_PATTERN_BYTES,
)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


def union(number: int) -> dict[str, Any]:
    return {"anyOf": [{"properties": {f"k{i}_{number}": {"type": "string"}}} for i in range(6)]}


@pytest.mark.parametrize(
    ("body", "good", "bad"),
    [
        ({"guided_regex": "[0-9]{4}"}, ["2024"], ["202", "20245", "abcd"]),
        ({"guided_choice": ['a"b', "c\n", "ca"]}, ['a"b', "c\n", "ca"], ["c", "a"]),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, ["yes", "no"], ["maybe", "ye"]),
        ({"guided_grammar": 'start: "a" /[0-9]+/'}, ["a1", "a123"], ["a", "1"]),
        ({"guided_json": {"type": "integer"}}, ["12", "-3"], ['"12"', "1.5"]),
        ({"guided_json": '{"type": "boolean"}'}, ["true", "false"], ["1"]),
        ({"guided_json": {}}, ["[1]", "null"], ["[1"]),
        ({"structured_outputs": {"regex": "a|b"}}, ["a", "b"], ["ab", "c"]),
        ({"structured_outputs": {"json_object": True}}, ['{"a": [1]}'], ["[1]", "1"]),
        ({"response_format": {"type": "json_object"}}, ["{}", '{\n "a": 1\n}'], ["[]"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 7}}}},
            ["7"],
            ["8", "77"],
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_texts_that_fit_may_come_and_end(
    grammars: Grammars, tokenizer: Any, body: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    grammar = grammars.compile(read_wanted(body))
    assert [fits(grammar, tokenizer, text) for text in good] == [True] * len(good)
    assert [fits(grammar, tokenizer, text) for text in bad] == [False] * len(bad)


def fits(grammar: Any, tokenizer: Any, text: str) -> bool:
    """Whether a constraint lets a text come, token by token, and end."""
    end = tokenizer.eos_token_id
    constraint = grammar.constraint((end,))
    for token in [*tokenizer(text)["input_ids"], end]:
        if not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize("body", [{}, {"response_format": {"type": "text"}}, {"guided_json": None}])
def test_nothing_asked_is_nothing(body: dict[str, Any]) -> None:
    assert read_wanted(body) is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "one form only"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "one form only"),
        ({"response_format": {"type": "xml"}}, "'xml'"),
        ({"response_format": "json"}, "no object"),
        ({"response_format": {"type": "json_schema"}}, "has no schema"),
        ({"structured_outputs": {"form": "a"}}, "does not know form"),
        ({"structured_outputs": ["a"]}, "no object"),
        ({"guided_json": "{"}, "is no JSON"),
        ({"guided_json": "[" * 100_000}, "is no JSON"),
        ({"guided_json": [1]}, "no JSON object"),
        ({"guided_json": deep(DEEPEST + 1)}, "levels deep"),
        ({"guided_json": {"enum": ["x" * MOST_BYTES]}}, "bytes"),
        ({"guided_regex": "x" * (MOST_PATTERN_BYTES + 1)}, "bytes"),
        ({"guided_json": {"pattern": "a?" * MOST_PATTERN_BYTES}}, "patterns of"),
        ({"guided_json": {"patternProperties": {"a?" * MOST_PATTERN_BYTES: {}}}}, "patterns of"),
        ({"guided_choice": ["x"] * (MOST_CHOICES + 1)}, "choice"),
        ({"guided_choice": []}, "choice"),
        ({"guided_choice": [1]}, "choice"),
        ({"guided_regex": 1}, "no text"),
        ({"guided_json": {"items": {"$ref": "https://example.com/a.json"}}}, "refers to"),
        ({"guided_json": {"$ref": "file:///etc/passwd"}}, "refers to"),
    ],
)
def test_what_cannot_be_read_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        read_wanted(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"guided_json": {"type": "strin"}}, "strin"),
        ({"guided_json": {"not": {}}}, "not"),
        ({"guided_json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"guided_json": {"$ref": "#/$defs/nothing"}}, "nothing"),
        ({"guided_json": {"$ref": "#"}}, "cannot go on"),
        ({"guided_json": {"enum": []}}, "Unsatisfiable"),
        ({"guided_json": {"oneOf": [{"type": "string"}, {"maxLength": 3}]}}, "oneOf"),
        ({"guided_regex": "["}, "invalid regex"),
        ({"guided_grammar": "start: unknown"}, "unknown"),
        ({"guided_json": {"allOf": [union(n) for n in range(40)]}}, "too large"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_a_token(
    grammars: Grammars, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        grammars.compile(read_wanted(body))


CHAINS: dict[str, Any] = {
    "references": {
        "guided_json": {
            "$defs": {
                **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}]} for i in range(2500)},
                "a2500": {"type": "string"},
            },
            "$ref": "#/$defs/a0",
        }
    },
    "arrays": {
        "guided_json": {
            "$defs": {
                **{
                    f"a{i}": {"type": "array", "items": {"$ref": f"#/$defs/a{i + 1}"}}
                    for i in range(1700)
                },
                "a1700": {},
            },
            "$ref": "#/$defs/a0",
        }
    },
    "terminals": {
        "guided_grammar": "start: R0\n"
        + "\n".join(f'R{i}: "a" R{i + 1}' for i in range(800))
        + '\nR800: "c"'
    },
}


TEXTS = {"references": '"ab"', "arrays": "[[[[]]]]", "terminals": "a" * 800 + "c"}


@pytest.mark.parametrize("name", CHAINS)
def test_long_chains_do_not_end_the_process(grammars: Grammars, tokenizer: Any, name: str) -> None:
    grammar = grammars.compile(read_wanted(CHAINS[name]))
    assert fits(grammar, tokenizer, TEXTS[name])


def test_tokens_beyond_the_tokenizer_never_come(grammars: Grammars, tokenizer: Any) -> None:
    allowed = grammars.compile(read_wanted({"guided_regex": r"(.|\n)*"})).constraint().allowed()
    assert allowed.shape == (400,)
    assert allowed.dtype == torch.bool
    assert not allowed[len(tokenizer) :].any()


def test_fewer_logits_than_tokens_are_fine(tokenizer: Any) -> None:
    grammar = Grammars(tokenizer, 300, [0]).compile(read_wanted({"guided_regex": "[a-z]+"}))
    assert grammar.constraint().allowed().shape == (300,)


def test_stop_ids_of_a_request_come_exactly_at_the_end(grammars: Grammars, tokenizer: Any) -> None:
    stop = tokenizer.convert_tokens_to_ids("~")
    constraint = grammars.compile(read_wanted({"guided_regex": "ab?"})).constraint((0, stop))
    assert not constraint.allowed()[[0, stop]].any()
    constraint.accept(tokenizer.convert_tokens_to_ids("a"))
    assert constraint.allowed()[[0, stop]].all()


def test_a_token_that_was_not_allowed_is_an_error(grammars: Grammars, tokenizer: Any) -> None:
    constraint = grammars.compile(read_wanted({"guided_regex": "[0-9]"})).constraint()
    with pytest.raises(EngineError, match="does not fit"):
        constraint.accept(tokenizer.convert_tokens_to_ids("a"))


def test_answers_to_one_grammar_do_not_disturb_each_other(
    grammars: Grammars, tokenizer: Any
) -> None:
    grammar = grammars.compile(read_wanted({"guided_regex": "ab"}))
    first, second = grammar.constraint(), grammar.constraint()
    first.accept(tokenizer.convert_tokens_to_ids("a"))
    assert first.allowed().tolist() != second.allowed().tolist()


def test_a_model_without_an_end_is_refused(tokenizer: Any) -> None:
    with pytest.raises(EngineError, match="no token ends an answer"):
        Grammars(tokenizer, 400, []).compile(read_wanted({"guided_regex": "a"}))


def test_a_union_told_apart_by_a_tag_is_followed(grammars: Grammars, tokenizer: Any) -> None:
    def tagged(kind: str) -> dict[str, Any]:
        fields = {"kind": {"const": kind}}
        return {"type": "object", "properties": fields, "required": ["kind"]}

    parts = [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]
    schema = {"$defs": {"cat": tagged("cat"), "dog": tagged("dog")}, "oneOf": parts}
    grammar = grammars.compile(read_wanted({"guided_json": schema}))
    assert fits(grammar, tokenizer, '{"kind": "dog"}')
    assert not fits(grammar, tokenizer, '{"kind": "cow"}')


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "oneOf",
                    "anyOf",
                    "enum",
                    "const",
                    "properties",
                    "required",
                    "items",
                    "$ref",
                    "$defs",
                    "pattern",
                    "a",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(schema=anything, field=st.sampled_from(["guided_json", "response_format", "guided_choice"]))
def test_no_body_causes_anything_but_a_clear_refusal(
    grammars: Grammars, schema: Any, field: str
) -> None:
    with suppress(EngineError):
        wanted = read_wanted(json.loads(json.dumps({field: schema})))
        if wanted is not None:
            assert grammars.compile(wanted).constraint().allowed().any()
