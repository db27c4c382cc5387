"""Answers in every form become calls, whole or cut into pieces; what is no call stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, strategies as st

from core_splitfuse.serving.tools import FORMS, Delta, Tools

ToolsOf = Callable[..., Tools]
ARGUMENTS = {"city": 'Zür"ich', "days": 3}
JSON = json.dumps(ARGUMENTS)
XML = '<parameter=city>\nZür"ich\n</parameter>\n<parameter=days>\n3\n</parameter>'
ANSWERS = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>',
    "llama": f'{{"name": "get_weather", "parameters": {JSON}}}',
    "mistral": f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {JSON}}}]',
    "qwen_xml": f"<tool_call>\n<function=get_weather>\n{XML}\n</function>\n</tool_call>",
    "json": f'{{"name": "get_weather", "arguments": {JSON}}}',
}
MARKED = ("hermes", "mistral", "qwen_xml")


def read(plan: Any, pieces: Sequence[str]) -> tuple[dict[str, Any], list[Delta], str]:
    reader = plan.reader("")
    deltas = [delta for piece in pieces for delta in reader.feed(piece)] + reader.finish()
    return reader.message(), deltas, reader.finish_reason("stop")


def together(deltas: Sequence[Delta]) -> dict[str, Any]:
    """A message from deltas, as clients of OpenAI's API put it together."""
    content, calls = "", list[dict[str, Any]]()
    for delta in (delta.as_dict() for delta in deltas):
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", []):
            if piece["index"] == len(calls):
                calls.append({key: value for key, value in piece.items() if key != "index"})
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    made: dict[str, Any] = {"role": "assistant", "content": content}
    return made | ({"content": content or None, "tool_calls": calls} if calls else {})


def test_the_form_is_told_from_the_chat_template(tools_of: ToolsOf, offered: list[Any]) -> None:
    found = {name: tools_of(name).plan(offered).form.name for name in FORMS}
    assert found == {name: name for name in FORMS}


@pytest.fixture(scope="module")
def plans(tools_of: ToolsOf) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {}}}
    weather = {"type": "function", "function": {"name": "get_weather", "parameters": schema}}
    return {name: tools_of(name).plan([weather]) for name in FORMS}


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_a_call_is_read_however_it_is_cut(plans: dict[str, Any], form: str, data: Any) -> None:
    before = data.draw(st.sampled_from(["", "Let me see.\n\n", "a < b [x] "])) * (form in MARKED)
    text = before + ANSWERS[form]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    message, deltas, reason = read(plans[form], pieces)
    assert message == together(deltas)
    assert (message["content"] or "").strip() == before.strip()
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == ARGUMENTS
    assert reason == "tool_calls"
    pattern = "[a-zA-Z0-9]{9}" if form == "mistral" else "call_[a-zA-Z0-9]{24}"
    assert re.fullmatch(pattern, call["id"])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", ANSWERS["hermes"] + "\n" + ANSWERS["hermes"]),
        ("mistral", "[TOOL_CALLS]" + json.dumps([{"name": "get_weather", "arguments": {}}] * 2)),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "A"}[TOOL_CALLS]clock[ARGS]{}'),
        ("qwen_xml", ANSWERS["qwen_xml"] + "\n" + ANSWERS["qwen_xml"]),
        ("json", ANSWERS["json"] + "\n" + ANSWERS["json"]),
        ("json", f"[{ANSWERS['json']}, {ANSWERS['json']}]"),
        ("llama", "<|python_tag|>" + ANSWERS["llama"] + "; " + ANSWERS["llama"]),
    ],
)
def test_two_calls_have_two_numbers_and_ids(plans: dict[str, Any], form: str, text: str) -> None:
    message, deltas, _ = read(plans[form], list(text))
    assert message == together(deltas)
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert message["content"] is None


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "No call: a <tool and <b> and {1}."),
        ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": }}\n</tool_call>'),
        ("hermes", "<tool_call>[]</tool_call> then text"),
        ("hermes", '<tool_call>{"name": "clock", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "get_weather", "argum'),
        ("qwen_xml", "<tool_call>\n<function=get_weather>\n<parameter=city>\nZ"),
        ("mistral", '[TOOL_CALLS][{"name": "get'),
        ("mistral", "[TOOL_CALLS] get_weather(city)"),
        ("llama", '{"name": "Ada", "born": 1815}'),
        ("llama", '{"a": 1} and more'),
        ("json", '{"name": "get_weather", "arguments": [1]}'),
        ("json", '{"name": "nobody", "arguments": {}}'),
        ("json", "{} [1]"),
        ("json", '{"name": "get_weather", "argu'),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_is_no_call_stays_text(plans: dict[str, Any], form: str, text: str, size: int) -> None:
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    message, deltas, reason = read(plans[form], pieces)
    assert message == together(deltas) == {"role": "assistant", "content": text}
    assert reason == "stop"


def test_half_a_character_in_arguments_can_be_sent(plans: dict[str, Any]) -> None:
    text = '<tool_call>{"name": "clock", "arguments": {"a": "\\ud800"}}</tool_call>'
    message, _, _ = read(plans["hermes"], [text])
    assert json.loads(json.dumps(message, ensure_ascii=False).encode()) == message
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": "\ud800"}


def test_text_before_a_call_does_not_wait_for_it(plans: dict[str, Any]) -> None:
    reader = plans["hermes"].reader("")
    assert reader.feed("I look") == [Delta(content="I look")]
    assert reader.feed(" it up <tool") == [Delta(content=" it up")]
    told = reader.feed(ANSWERS["hermes"].removeprefix("<tool"))
    assert [bool(delta.call and delta.call.id) for delta in told] == [True, False]


def test_without_tools_text_passes_through(tools_of: ToolsOf) -> None:
    reader = tools_of("hermes").plan(None).reader("")
    assert reader.feed(ANSWERS["hermes"]) == [Delta(content=ANSWERS["hermes"])]
    assert reader.finish() == []
    assert reader.finish_reason("length") == "length"


RESPONSE: dict[str, Any] = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"<call:(?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close": "<|end|>"},
    },
}


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_a_response_template_of_the_tokenizer_comes_first(
    tools_of: ToolsOf, offered: list[Any], size: int
) -> None:
    plan = tools_of("hermes", response_template=RESPONSE).plan(offered)
    assert plan.keeps_special
    text = f"It rains.</think>So:<call:get_weather>{JSON}</call><|end|>"
    reader = plan.reader("<|user|>Hi<|end|><|assistant|><think>")
    deltas = [d for at in range(0, len(text), size) for d in reader.feed(text[at : at + size])]
    deltas += reader.finish()
    message = reader.message()
    assert message["reasoning_content"] == "It rains."
    assert message["content"] == "So:"
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS
    assert "".join(delta.reasoning for delta in deltas) == "It rains."


def test_a_response_template_that_cannot_read_leaves_text(
    tools_of: ToolsOf, offered: list[Any]
) -> None:
    reader = tools_of("hermes", response_template=RESPONSE).plan(offered).reader("<|assistant|>")
    told = [
        *reader.feed("So:<call:clock>{broken</call> and"),
        *reader.feed(" on"),
        *reader.finish(),
    ]
    assert "{broken" in "".join(delta.content for delta in told)
    assert "tool_calls" not in reader.message()
