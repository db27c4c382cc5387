"""Tokenizers whose chat templates show their models the forms that calls are written in."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from core.recipes.tokens import train_tokenizer
from core_splitfuse.serving.structured import Grammars
from core_splitfuse.serving.tools import Tools

VOCABULARY = 400

_TURNS = """
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}
CALL
{%- endfor %}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
_TOLD = "{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
_CALLS = {
    "hermes": '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>",
    "llama": '{"name": "{{ call.function.name }}", "parameters": '
    "{{ call.function.arguments | tojson }}}",
    "mistral": '[TOOL_CALLS][{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}]",
    "qwen_xml": "<tool_call>\n<function={{ call.function.name }}>"
    "{% for key, value in call.function.arguments.items() %}\n<parameter={{ key }}>\n"
    "{{ value }}\n</parameter>{% endfor %}\n</function>\n</tool_call>",
    "json": '{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}",
}

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 8},
                "days": {"$ref": "#/$defs/few"},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"few": {"type": "integer", "minimum": 1, "maximum": 7}},
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="session")
def described() -> str:
    text = inspect.getsource(json) + '{"name": "get_weather", "arguments": {"city": "Ada"}}\n' * 9
    return train_tokenizer([text], 380)


@pytest.fixture(scope="session")
def tokenizer_of(described: str) -> Callable[..., PreTrainedTokenizerFast]:
    def make(form: str = "", **fields: Any) -> PreTrainedTokenizerFast:
        made = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(described), eos_token="<|endoftext|>", **fields
        )
        if form in ("hermes", "qwen_xml"):
            made.add_tokens(["<tool_call>", "</tool_call>"])
        if form == "mistral":
            made.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
        head = _TOLD if form else ""
        made.chat_template = head + _TURNS.replace("CALL", _CALLS.get(form, ""))
        return made

    return make


@pytest.fixture(scope="session")
def tools_of(tokenizer_of: Callable[..., Any]) -> Callable[..., Tools]:
    def make(form: str = "", option: str = "auto", **fields: Any) -> Tools:
        tokenizer = tokenizer_of(form, **fields)
        return Tools(
            tokenizer, Grammars(tokenizer, VOCABULARY, [tokenizer.eos_token_id]), form=option
        )

    return make


@pytest.fixture
def offered() -> list[dict[str, Any]]:
    return [WEATHER, CLOCK]
