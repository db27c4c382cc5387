"""The real openai client chats: the model's template, streams, log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

MESSAGES: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what does the fox say"},
]
NO_END = {"0": -100}
DRAWN = {"temperature": 1.0, "seed": 3, "max_tokens": 24, "logit_bias": NO_END}


def chat(live: Any, messages: Any = MESSAGES, **fields: Any) -> Any:
    return live.client.chat.completions.create(model="tiny", messages=messages, **fields)


def test_the_prompt_is_what_the_template_makes(live: Any) -> None:
    text = live.served.tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    ids = live.served.encode(text, special=False)
    told = live.http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert told["tokens"] == ids
    chatted = chat(live, **DRAWN)
    assert chatted.usage.prompt_tokens == len(ids)
    completed = live.client.completions.create(model="tiny", prompt=ids, **DRAWN)
    assert chatted.choices[0].message.content == completed.choices[0].text
    assert chatted.choices[0].message.role == "assistant"


def test_parts_of_text_are_lines_of_one_text(live: Any) -> None:
    def ask(content: Any) -> str:
        found = chat(live, [MESSAGES[0], {"role": "user", "content": content}], **DRAWN)
        text: str = found.choices[0].message.content
        return text

    parts = [{"type": "text", "text": "what does"}, {"type": "text", "text": "the fox say"}]
    assert ask(parts) == ask("what does\nthe fox say")


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_answer_says(live: Any, n: int) -> None:
    whole = chat(live, n=n, **DRAWN)
    texts, finishes, roles = [""] * n, [""] * n, [""] * n
    for chunk in chat(live, n=n, stream=True, **DRAWN):
        (choice,) = chunk.choices
        roles[choice.index] += choice.delta.role or ""
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] += choice.finish_reason or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert roles == ["assistant"] * n
    assert len(set(texts)) == n


def test_log_probabilities_are_those_of_a_full_forward(live: Any, model: Any) -> None:
    found = chat(live, logprobs=True, top_logprobs=4, **DRAWN)
    content = found.choices[0].logprobs.content
    ids = live.http.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    table = live.served.table
    numbers = {table.bytes_of(number): number for number in range(len(live.served.tokenizer))}
    for entry in content:
        with torch.no_grad():
            own = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        assert [numbers[bytes(top.bytes)] for top in entry.top_logprobs] == own.topk(4)[1].tolist()
        for told in (entry, *entry.top_logprobs):
            assert math.isclose(told.logprob, own[numbers[bytes(told.bytes)]], abs_tol=1e-3)
        ids.append(numbers[bytes(entry.bytes)])
    spelled = b"".join(bytes(entry.bytes) for entry in content)
    assert spelled.decode(errors="replace") == found.choices[0].message.content


def test_streamed_log_probabilities_are_the_same(live: Any) -> None:
    fields = {**DRAWN, "logprobs": True, "top_logprobs": 2}
    whole = chat(live, **fields).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in chat(live, stream=True, **fields)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == whole
    assert len(whole) == 24


def test_without_a_limit_an_answer_has_the_servers_default(live: Any) -> None:
    found = chat(live, temperature=0, logit_bias=NO_END)
    assert found.usage.completion_tokens == 48
    assert found.choices[0].finish_reason == "length"


def test_without_a_limit_an_answer_has_what_is_left_of_the_context(live: Any) -> None:
    used = chat(live, max_tokens=1).usage.prompt_tokens
    filler = [{"role": "user", "content": "\u00fe" * 200}]
    while used < live.served.context - 40:
        filler[0]["content"] += "\u00fe" * 8
        told = live.http.post("/tokenize", json={"messages": filler}).json()
        used = told["count"]
    found = chat(live, filler, temperature=0, logit_bias=NO_END)
    assert found.usage.total_tokens == live.served.context


def test_both_names_of_the_limit_are_known(live: Any) -> None:
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}):
        found = chat(live, temperature=0, logit_bias=NO_END, **fields)
        assert found.usage.completion_tokens == 5


def test_stop_strings_and_usage_in_a_stream(live: Any) -> None:
    whole = chat(live, **DRAWN).choices[0].message.content
    stop = whole[5:9]
    chunks = list(
        chat(live, stop=[stop], stream=True, stream_options={"include_usage": True}, **DRAWN)
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert text == whole[: whole.index(stop)]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert 0 < chunks[-1].usage.completion_tokens < 24


def test_a_model_without_a_template_says_so(model: Any, tokenizer: Any, start: Any) -> None:
    import copy

    from core.engines.plain import PlainEngine

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with start(PlainEngine(model), tokenizer=bare) as live:
        response = live.http.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES}
        )
        assert response.status_code == 400
        assert "chat template" in response.json()["error"]["message"]


def test_what_a_template_refuses_is_the_callers_error(
    model: Any, tokenizer: Any, start: Any
) -> None:
    import copy

    from core.engines.plain import PlainEngine

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with start(PlainEngine(model), tokenizer=strict) as live:
        response = live.http.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES}
        )
        assert response.status_code == 400
        assert "roles must alternate" in response.json()["error"]["message"]
