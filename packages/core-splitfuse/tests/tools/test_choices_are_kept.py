"""``tool_choice`` holds random models to calls that fit, and bad requests are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from core import Request, Sampling, generate
from core.engines.plain import PlainEngine
from core.errors import EngineError
from core.testing import tiny
from core_splitfuse.serving.structured import read_wanted
from core_splitfuse.serving.tools import FORMS, Plan, Tools, template_messages

ToolsOf = Callable[..., Tools]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(
        vocab_size=400, num_hidden_layers=1, hidden_size=16, max_position_embeddings=2048
    )


def answers(model: Any, tokenizer: Any, plan: Plan, seeds: range) -> list[dict[str, Any]]:
    """Messages of random answers that ended by themselves."""
    assert plan.grammar is not None
    ends = (tokenizer.eos_token_id,)
    blank = [i for i in range(len(tokenizer)) if tokenizer.decode([i]).isspace()]
    requests = [
        Request(
            prompt=[1 + seed],
            constraint=plan.grammar.constraint(ends),
            sampling=Sampling(
                temperature=2.0,
                seed=seed,
                stop_ids=ends,
                max_new_tokens=1000,
                logit_bias=dict.fromkeys(blank, -9.0),
            ),
        )
        for seed in seeds
    ]
    with PlainEngine(model) as engine:
        made = generate(engine, requests)
    messages = []
    for answer in made:
        assert answer.finish == "stop"
        ids = [token for token in answer.ids if token not in ends]
        reader = plan.reader("")
        for letter in tokenizer.decode(ids, skip_special_tokens=not plan.keeps_special):
            reader.feed(letter)
        reader.finish()
        messages.append(reader.message())
    return messages


def check(call: dict[str, Any], offered: list[Any]) -> None:
    [schema] = [
        tool["function"].get("parameters", {"maxProperties": 0})
        for tool in offered
        if tool["function"]["name"] == call["function"]["name"]
    ]
    jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


@pytest.mark.parametrize("form", FORMS)
def test_a_required_call_always_comes_and_fits(
    model: Any, tokenizer_of: Any, tools_of: ToolsOf, offered: list[Any], form: str
) -> None:
    plan = tools_of(form).plan(offered, "required", parallel=False)
    for message in answers(model, tokenizer_of(form), plan, range(6)):
        assert message["content"] is None
        [call] = message["tool_calls"]
        check(call, offered)


@pytest.mark.parametrize("form", ["hermes", "mistral", "json"])
def test_a_named_function_is_the_one_that_is_called(
    model: Any, tokenizer_of: Any, tools_of: ToolsOf, offered: list[Any], form: str
) -> None:
    choice = {"type": "function", "function": {"name": "clock"}}
    plan = tools_of(form).plan(offered, choice)
    for message in answers(model, tokenizer_of(form), plan, range(3)):
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["clock"]


def test_several_calls_may_be_required_at_once(
    model: Any, tokenizer_of: Any, tools_of: ToolsOf, offered: list[Any]
) -> None:
    plan = tools_of("mistral").plan(offered, "required")
    counts = set[int]()
    for message in answers(model, tokenizer_of("mistral"), plan, range(6)):
        for call in message["tool_calls"]:
            check(call, offered)
        counts.add(len(message["tool_calls"]))
    assert max(counts) > 1


def test_a_format_holds_for_answers_that_are_no_calls(
    model: Any, tokenizer_of: Any, tools_of: ToolsOf, offered: list[Any]
) -> None:
    wanted = read_wanted({"guided_regex": "[0-9]{2,4}"})
    plan = tools_of("json").plan(offered, "auto", wanted=wanted)
    kinds = set[str]()
    for message in answers(model, tokenizer_of("json"), plan, range(12)):
        if "tool_calls" in message:
            for call in message["tool_calls"]:
                check(call, offered)
        else:
            assert message["content"].isdecimal()
        kinds.add("call" if "tool_calls" in message else "text")
    assert kinds == {"call", "text"}


def test_an_answer_may_be_of_a_form_without_tools(tools_of: ToolsOf) -> None:
    plan = tools_of("hermes").plan(None, wanted=read_wanted({"guided_choice": ["a"]}))
    assert plan.grammar is not None
    assert plan.tools is None


@pytest.mark.parametrize("choice", [None, "auto"])
def test_a_free_answer_is_held_to_nothing(
    tools_of: ToolsOf, offered: list[Any], choice: object
) -> None:
    plan = tools_of("hermes").plan(offered, choice)
    assert plan.grammar is None
    assert plan.tools == offered


def test_no_call_is_offered_where_none_may_come(tools_of: ToolsOf, offered: list[Any]) -> None:
    plan = tools_of("hermes").plan(offered, "none")
    assert plan.tools is None
    assert plan.reader("").feed("<tool_call>")[0].content == "<tool_call>"


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([named("f")], named("g"), "no such tool"),
        ([named("f")], "sometimes", "tool_choice is unknown"),
        ([named("f")], {"type": "function"}, "tool_choice is unknown"),
        ([], "required", "has no tools"),
        ([named("f"), named("f")], None, "two tools"),
        ([named("f g")], None, "no name"),
        ([{"type": "web_search"}], None, "only functions"),
        ([named("f")] * 200, None, "too many"),
        ([{"function": {"name": "f", "parameters": [1]}}], None, "no JSON object"),
        ([{"function": {"name": "f", "parameters": {"$ref": "http://a"}}}], None, "refers to"),
        ([{"function": {"name": "f", "parameters": {"not": {}}}}], "required", "cannot be"),
    ],
)
def test_bad_tools_are_refused(
    tools_of: ToolsOf, tools: list[Any], choice: object, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        tools_of("hermes").plan(tools, choice)


def test_a_template_without_a_place_for_tools_is_refused(
    tools_of: ToolsOf, offered: list[Any]
) -> None:
    with pytest.raises(EngineError, match="cannot be told of tools"):
        tools_of("").plan(offered)


def test_unknown_forms_and_wrong_templates_are_refused(tools_of: ToolsOf) -> None:
    with pytest.raises(EngineError, match="hermes"):
        tools_of("hermes", option="hermse")
    with pytest.raises(EngineError, match="response_template"):
        tools_of("hermes", response_template={"fields": {"content": {"clos": "x"}}})


@pytest.mark.parametrize("form", FORMS)
def test_earlier_calls_reach_the_chat_template_as_objects(tokenizer_of: Any, form: str) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "How"}, {"text": "is it?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": call}]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    text = tokenizer_of(form).apply_chat_template(
        template_messages(messages), tokenize=False, add_generation_prompt=True
    )
    assert "How\nis it?" in text
    assert "get_weather" in text
    assert "Rome" in text
    assert '\\"' not in text


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [{"id": "1"}]},
    ],
)
def test_messages_that_no_template_can_take_are_refused(message: dict[str, Any]) -> None:
    with pytest.raises(EngineError):
        template_messages([message])
