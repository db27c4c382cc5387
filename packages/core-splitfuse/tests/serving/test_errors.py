"""What is refused, in OpenAI's form, with the field that is to blame; others are unharmed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

BODY = {"model": "tiny", "prompt": "the fox", "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}

# What is refused before an engine sees it is the same for all of them.
ONE = pytest.mark.parametrize("live", ["splitfuse"], indirect=True)

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": [5, 100000]}, "", "100000"),
    ({"prompt": [-1]}, "prompt", "token ids"),
    ({"prompt": ["a", 1]}, "prompt", "text"),
    ({"prompt": {"a": 1}}, "prompt", "text"),
    ({"prompt": [True]}, "prompt", "text"),
    ({"prompt": None}, "prompt", "text"),
    ({"prompt": "\ud800"}, "", "Unicode"),
    ({"prompt": ["fox", "\udfff dog"]}, "", "Unicode"),
    ({"stop": "\ud800"}, "stop.0", "unicode"),
    ({"max_tokens": 0}, "max_tokens", "greater"),
    ({"max_tokens": "4"}, "max_tokens", "integer"),
    ({"max_tokens": 100000}, "max_tokens", "100002"),
    ({"temperature": -0.1}, "temperature", "greater"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater"),
    ({"n": 0}, "n", "greater"),
    ({"n": 129}, "n", "128"),
    ({"n": 65, "prompt": ["a", "b"]}, "n", "128"),
    ({"seed": 2**70}, "seed", ""),
    ({"seed": 1.5}, "seed", "integer"),
    ({"stop": [""]}, "stop.0", "1 character"),
    ({"stop": ["a"] * 17}, "stop", "16"),
    ({"logprobs": 21}, "logprobs", "20"),
    ({"logprobs": 1, "echo": True}, "logprobs", "prompt"),
    ({"logit_bias": {"fox": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "100"),
    ({"logit_bias": {"100000": 1}}, "", "100000"),
    ({"suffix": "end"}, "suffix", "suffix"),
    ({"best_of": 3}, "best_of", "n"),
    ({"min_tokens": 5}, "min_tokens", "max_tokens"),
    ({"stop_token_ids": [99999]}, "", "99999"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"beam_width": 3}, "beam_width", "unknown"),
    ({"use_beam_search": True}, "use_beam_search", "unknown"),
    ({"response_format": {"type": "yaml"}}, "", "yaml"),
]


def error_of(live: Any, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    response = live.http.post(path, content=json.dumps(body), headers=headers)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@ONE
@pytest.mark.parametrize(("fields", "param", "word"), REFUSED, ids=str)
def test_completions_refuse(live: Any, fields: dict[str, Any], param: str, word: str) -> None:
    error = error_of(live, "/v1/completions", {**BODY, **fields})
    assert (error["param"] or "") == param
    assert word in error["message"]
    assert error["type"] == "invalid_request_error"


@ONE
@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"messages": []}, "messages", "1 item"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role", "missing"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", ""),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
            "text",
        ),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "max_tokens"),
        ({"max_tokens": None, "max_completion_tokens": 10**6}, "max_tokens", "1000"),
        ({"functions": []}, "functions", "unknown"),
        ({"audio": {}}, "audio", "unknown"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "tokenize"),
    ],
    ids=str,
)
def test_chats_refuse(live: Any, fields: dict[str, Any], param: str, word: str) -> None:
    error = error_of(live, "/v1/chat/completions", {**CHAT, **fields})
    assert (error["param"] or "") == param
    assert word in error["message"]


def test_too_long_a_prompt_is_refused_with_both_numbers(live: Any) -> None:
    ids = [5] * 500
    error = error_of(live, "/v1/completions", {**BODY, "prompt": ids, "max_tokens": 13})
    assert error["code"] == "context_length_exceeded"
    for number in ("500", "13", "513", "512"):
        assert number in error["message"]
    live.client.completions.create(**{**BODY, "prompt": ids, "max_tokens": 12})


def test_what_only_concerns_accounting_is_ignored(live: Any) -> None:
    more = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert live.http.post("/v1/completions", json={**BODY, **more}).status_code == 200


def test_the_client_raises_its_own_errors(live: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        live.client.completions.create(model="tiny", prompt="", max_tokens=3)
    assert refused.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as unknown:
        live.client.completions.create(model="other", prompt="hi")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        live.client.completions.create(model="tiny", prompt="", stream=True)


@ONE
@pytest.mark.parametrize(
    ("path", "status"), [("/v1/nothing", 404), ("/v1/models/other", 404), ("/v1/completions", 405)]
)
def test_wrong_paths_have_errors_of_the_same_form(live: Any, path: str, status: int) -> None:
    response = live.http.get(path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@ONE
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b"null"],
    ids=lambda content: content[:12].decode("latin-1"),
)
def test_bodies_that_are_no_call_are_refused(live: Any, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        response = live.http.post(
            path, content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["message"]


def test_a_form_of_a_web_page_is_no_call(live: Any) -> None:
    sent = json.dumps(BODY)
    response = live.http.post(
        "/v1/completions", content=sent, headers={"content-type": "text/plain"}
    )
    assert response.status_code == 400


def test_a_bad_prompt_harms_no_other(live: Any) -> None:
    stream = live.client.completions.create(**{**BODY, "max_tokens": 40}, stream=True)
    next(iter(stream))
    error_of(live, "/v1/completions", {**BODY, "prompt": [[5], [100000]]})
    assert sum(1 for _ in stream) > 3
    live.settle(lambda: live.loop.idle)


def test_the_key_is_asked_for_everywhere_but_at_the_page_and_health(
    model: Any, start: Callable[..., Any]
) -> None:
    from core.engines.plain import PlainEngine

    with start(PlainEngine(model), api_key="s3cret") as live:
        assert live.client.completions.create(**BODY).choices
        live.key = "wrong"
        with pytest.raises(openai.AuthenticationError):
            live.client.completions.create(**BODY)
        for path in ("/v1/models", "/metrics", "/tokenize", "/nothing"):
            assert live.http.get(path).status_code == 401
        assert live.http.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/"):
            assert live.http.get(path).status_code == 200


def test_large_bodies_are_refused_before_they_are_read(
    model: Any, start: Callable[..., Any]
) -> None:
    from core.engines.plain import PlainEngine

    with start(PlainEngine(model), max_body=1000) as live:
        large = {**BODY, "prompt": "x" * 2000}
        assert error_of(live, "/v1/completions", large, 413)["code"] == "body_too_large"

        def chunks() -> Any:
            yield from (json.dumps(large).encode(),) * 3

        response = live.http.post(
            "/v1/completions", content=chunks(), headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert live.client.completions.create(**BODY).choices


def test_other_host_names_are_refused(model: Any, start: Callable[..., Any]) -> None:
    from core.engines.plain import PlainEngine

    with start(PlainEngine(model), hosts=frozenset({"my.host"})) as live:
        for host, status in [
            ("evil.example", 403),
            ("127.0.0.1.evil.example", 403),
            ("localhost:8000", 200),
            ("MY.host", 200),
            ("[::1]:8000", 200),
            ("127.0.0.1", 200),
        ]:
            response = live.http.get("/v1/models", headers={"host": host})
            assert response.status_code == status, host


def test_other_web_pages_may_not_read_answers(live: Any) -> None:
    response = live.http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers
