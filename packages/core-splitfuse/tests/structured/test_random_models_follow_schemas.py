"""A model of random weights, sampled at random, answers in valid JSON every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

Ask = Callable[..., list[tuple[str, str]]]

SCHEMAS: dict[str, Any] = {
    "flat": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "kind": {"enum": ["a", 'b\n"c"', 3, None]},
            "size": {"type": "number", "minimum": -1.5, "maximum": 10},
            "count": {"type": "integer", "minimum": 0, "exclusiveMaximum": 1000},
            "on": {"type": "boolean"},
        },
        "required": ["name", "code", "kind", "size", "count", "on"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "minItems": 1,
        "maxItems": 3,
        "items": {
            "type": "object",
            "properties": {
                "id": {"type": "string", "format": "uuid"},
                "day": {"type": "string", "format": "date"},
                "point": {
                    "type": "array",
                    "prefixItems": [
                        {"type": "integer", "minimum": -99, "maximum": 99},
                        {"type": "number", "minimum": 0, "maximum": 1},
                    ],
                    "items": False,
                    "minItems": 2,
                },
            },
            "required": ["id", "point"],
            "additionalProperties": False,
        },
    },
    "union": {
        "$defs": {
            "leaf": {
                "type": "object",
                "properties": {
                    "kind": {"const": "leaf"},
                    "value": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 5}]},
                },
                "required": ["kind", "value"],
                "additionalProperties": False,
            },
            "node": {
                "type": "object",
                "properties": {
                    "kind": {"const": "node"},
                    "left": {"$ref": "#/$defs/leaf"},
                    "right": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "boolean"}]},
                },
                "required": ["kind", "left", "right"],
                "additionalProperties": False,
            },
        },
        "oneOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/node"}],
    },
    "nested": {
        "type": "object",
        "properties": {
            "tags": {
                "type": "array",
                "items": {"type": "string", "minLength": 1, "maxLength": 4},
                "maxItems": 3,
            },
            "more": {
                "type": "object",
                "properties": {"even": {"type": "integer", "multipleOf": 2}},
                "additionalProperties": False,
            },
        },
        "required": ["tags", "more"],
        "additionalProperties": False,
    },
}


def check(ask: Ask, name: str, seeds: range, engine: str) -> None:
    schema = SCHEMAS[name]
    body = {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": name, "schema": schema, "strict": True},
        }
    }
    made = ask(body, seeds, engine=engine)
    validator = jsonschema.Draft202012Validator(schema)
    for text, finish in made:
        assert finish == "stop", text
        validator.validate(json.loads(text))
    assert len({text for text, _ in made}) > len(seeds) // 2  # Not one text over and over.


@pytest.mark.parametrize(
    ("name", "count"), [("flat", 50), ("array", 20), ("union", 70), ("nested", 60)]
)
def test_all_of_200_answers_are_valid(answers: Ask, name: str, count: int) -> None:
    check(answers, name, range(count), "splitfuse")


def test_they_are_with_the_plain_engine(answers: Ask) -> None:
    check(answers, "nested", range(300, 310), "plain")


@pytest.mark.nightly
@pytest.mark.parametrize("engine", ["plain", "splitfuse"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_all_of_1600_answers_are_valid(answers: Ask, name: str, engine: str) -> None:
    check(answers, name, range(1000, 1200), engine)


def test_an_object_without_a_schema_is_an_object(answers: Ask) -> None:
    made = answers({"response_format": {"type": "json_object"}}, range(10), most=200)
    ended = [text for text, finish in made if finish == "stop"]
    assert len(ended) > 1
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_an_answer_cut_by_its_length_is_the_start_of_one(answers: Ask) -> None:
    body = {"structured_outputs": {"json": SCHEMAS["flat"]}}
    for text, finish in answers(body, range(10), most=6):
        assert finish == "length"
        assert text.startswith("{")
