"""Structured output, tools and the chat page through the server, with random weights."""

from __future__ import annotations

import json
from typing import Any

import pytest

SCHEMA = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["fox", "dog"]},
        "fast": {"type": "boolean"},
        "legs": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["animal", "fast", "legs"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}}
MESSAGES: Any = [{"role": "user", "content": "describe the fox"}]
TOOL: Any = {
    "type": "function",
    "function": {"name": "describe", "description": "an animal", "parameters": SCHEMA},
}
WITH_TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(live: Any, **fields: Any) -> Any:
    return live.client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        seed=5,
        max_tokens=150,
        logit_bias=no_white_space(live),
        **fields,
    )


def no_white_space(live: Any) -> dict[str, int]:
    """What keeps random weights from writing lines and lines of nothing, as JSON allows."""
    table, count = live.served.table, len(live.served.tokenizer)
    return {str(token): -100 for token in range(count) if table.text_of(token).isspace()}


def require_animal(text: str) -> None:
    found = json.loads(text)
    assert set(found) == {"animal", "fast", "legs"}
    assert found["animal"] in {"fox", "dog"}
    assert isinstance(found["fast"], bool)


def test_answers_follow_a_schema(live: Any) -> None:
    whole = chat(live, response_format=FORMAT, n=4)
    for choice in whole.choices:
        require_animal(choice.message.content)
        assert choice.finish_reason == "stop"
    streamed = ["", "", "", ""]
    for chunk in chat(live, response_format=FORMAT, n=4, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [choice.message.content for choice in whole.choices]


def test_completions_follow_a_choice_and_a_schema(live: Any) -> None:
    def complete(**form: Any) -> str:
        found = live.client.completions.create(
            model="tiny",
            prompt="the animal is",
            max_tokens=200,
            seed=1,
            logit_bias=no_white_space(live),
            extra_body=form,
        )
        text: str = found.choices[0].text
        return text

    assert complete(structured_outputs={"choice": ["fox", "dog"]}) in {"fox", "dog"}
    assert complete(guided_choice=["fox", "dog"]) in {"fox", "dog"}
    assert complete(guided_regex="a{3}b") == "aaab"
    require_animal(complete(response_format=FORMAT))


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema"}},
        {"response_format": FORMAT, "guided_regex": "a"},
        {"guided_regex": "("},
    ],
    ids=str,
)
def test_forms_that_cannot_be_are_refused(live: Any, form: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, **form}
    response = live.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("slowed", ["splitfuse"], indirect=True)
def test_a_tool_that_must_be_called_is_called(
    model: Any, tokenizer: Any, start: Any, slowed: Any
) -> None:
    import copy

    able = copy.deepcopy(tokenizer)
    able.chat_template = WITH_TOOLS
    fields: Any = {"tools": [TOOL], "tool_choice": "required"}
    with start(slowed, tokenizer=able) as live:
        found = chat(live, **fields).choices[0]
        (call,) = found.message.tool_calls
        assert (call.function.name, found.finish_reason) == ("describe", "tool_calls")
        require_animal(call.function.arguments)
        arguments = name = finish = ""
        for chunk in chat(live, stream=True, **fields):
            (choice,) = chunk.choices
            for delta in choice.delta.tool_calls or ():
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
            finish += choice.finish_reason or ""
        assert (name, finish) == ("describe", "tool_calls")
        assert arguments == call.function.arguments


def test_tools_of_a_model_that_knows_none_are_refused(live: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "tools": [TOOL]}
    response = live.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "tool" in response.json()["error"]["message"]


def test_the_page_comes_with_all_its_files_and_runs_no_others(live: Any) -> None:
    page = live.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("chat.css", "chat.js", "api.js", "text.js", "icon.svg"):
        response = live.http.get(f"/page/{name}")
        assert response.status_code == 200
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.content
    assert live.http.get("/page/../loop.py").status_code == 404
