"""The real openai client completes prompts: streamed or not, sampled, penalized, with logprobs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

PROMPT = "the quick brown fox"
NO_END = {"0": -100}
DRAWN = {"temperature": 1.0, "seed": 7, "max_tokens": 24, "logit_bias": NO_END}


def complete(live: Any, prompt: Any = PROMPT, **fields: Any) -> Any:
    known = {"extra_body": {k: fields.pop(k) for k in list(fields) if k in EXTRA}}
    return live.client.completions.create(model="tiny", prompt=prompt, **known, **fields)


EXTRA = {
    *("min_p", "top_k", "repetition_penalty", "min_tokens", "priority", "cache_salt"),
    *("stop_token_ids", "ignore_eos", "add_special_tokens"),
}


def streamed(live: Any, prompt: Any = PROMPT, **fields: Any) -> dict[int, str]:
    texts: dict[int, str] = {}
    for chunk in complete(live, prompt, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


def texts_of(completion: Any) -> dict[int, str]:
    return {choice.index: choice.text for choice in completion.choices}


def test_greedy_text_is_what_the_model_generates(live: Any, model: Any) -> None:
    ids = live.served.encode(PROMPT)
    made = model.generate(
        torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=0, pad_token_id=0
    )[0, len(ids) :].tolist()
    found = complete(live, temperature=0, max_tokens=24)
    assert found.choices[0].text == live.served.decode(made)
    assert len(set(made)) > 10
    assert found.usage.completion_tokens == len(made)
    assert found.usage.prompt_tokens == len(ids)
    assert found.choices[0].finish_reason == ("stop" if made[-1] == 0 else "length")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("prompts", [PROMPT, ["the lazy dog", "def main"], [40, 41, 42]])
def test_a_stream_says_what_the_whole_answer_says(live: Any, n: int, prompts: Any) -> None:
    whole = complete(live, prompts, n=n, **DRAWN)
    assert streamed(live, prompts, n=n, **DRAWN) == texts_of(whole)
    count = len(prompts) if isinstance(prompts[0], str) and not isinstance(prompts, str) else 1
    assert len(whole.choices) == n * count
    assert len({choice.text for choice in whole.choices}) == n * count


def test_all_forms_of_a_prompt_give_the_same_answer(live: Any) -> None:
    ids = live.served.encode(PROMPT)
    forms = [PROMPT, [PROMPT], ids, [ids]]
    assert len({complete(live, form, **DRAWN).choices[0].text for form in forms}) == 1


def test_a_seed_says_what_is_drawn_whoever_else_is_served(live: Any) -> None:
    alone = complete(live, **DRAWN).choices[0].text
    crowd = live.client.completions.create(
        model="tiny", prompt=["dog", "fox"], n=2, max_tokens=30, stream=True
    )
    next(iter(crowd))
    assert complete(live, **DRAWN).choices[0].text == alone
    crowd.close()
    assert complete(live, ["dog", PROMPT], **DRAWN).choices[1].text == alone
    assert complete(live, n=3, **DRAWN).choices[0].text == alone
    assert complete(live, **{**DRAWN, "seed": 8}).choices[0].text != alone


def test_without_a_seed_every_call_draws_anew(live: Any) -> None:
    texts = {complete(live, temperature=1.0, max_tokens=24).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_the_second_answer_of_a_seed_is_not_the_first_of_the_next(live: Any) -> None:
    first, second = (complete(live, n=2, **{**DRAWN, "seed": seed}).choices for seed in (7, 8))
    assert first[1].text != second[0].text


def test_stop_strings_end_the_answer_before_them(live: Any) -> None:
    whole = complete(live, **DRAWN).choices[0].text
    assert len(whole) > 12
    stop = whole[6:9]
    expected = whole[: whole.index(stop)]
    fields = {**DRAWN, "stop": ["never there", stop, "nor that"]}
    found = complete(live, **fields)
    assert found.choices[0].text == expected
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens < 24
    assert streamed(live, **fields)[0] == expected


def test_what_was_held_back_for_a_stop_string_comes_at_the_end(live: Any) -> None:
    whole = complete(live, **DRAWN).choices[0].text
    stop = whole[-2:] + "never there"
    assert complete(live, stop=stop, **DRAWN).choices[0].text == whole
    assert streamed(live, stop=stop, **DRAWN)[0] == whole


def test_log_probabilities_are_those_of_a_full_forward(live: Any, model: Any) -> None:
    fields = {**DRAWN, "temperature": 0.7, "logprobs": 5, "presence_penalty": 1.0}
    found = complete(live, **fields).choices[0].logprobs
    ids, table = live.served.encode(PROMPT), live.served.table
    numbers = {table.text_of(number): number for number in range(len(live.served.tokenizer))}
    for text, logprob, told in zip(
        found.tokens, found.token_logprobs, found.top_logprobs, strict=True
    ):
        with torch.no_grad():
            own = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        best = own.topk(5).indices.tolist()
        assert {numbers[name] for name in told} == {*best, numbers[text]}
        for name, value in (*told.items(), (text, logprob)):
            assert math.isclose(value, own[numbers[name]], abs_tol=1e-3)
        ids.append(numbers[text])


def test_streamed_log_probabilities_are_the_same(live: Any) -> None:
    fields = {**DRAWN, "logprobs": 3}
    whole = complete(live, **fields).choices[0].logprobs
    tokens: list[str] = []
    offsets: list[int] = []
    for chunk in complete(live, stream=True, **fields):
        tokens += chunk.choices[0].logprobs.tokens
        offsets += chunk.choices[0].logprobs.text_offset
    assert (tokens, offsets) == (whole.tokens, whole.text_offset)
    assert len(tokens) == 24


def test_tokens_of_a_stop_string_have_no_log_probabilities(live: Any) -> None:
    whole = complete(live, logprobs=0, **DRAWN).choices[0]
    stop = whole.text[8:]
    found = complete(live, logprobs=0, stop=stop, **DRAWN).choices[0]
    assert len(found.text) >= max(found.logprobs.text_offset)
    kept = [offset for offset in whole.logprobs.text_offset if offset < len(found.text)]
    assert found.logprobs.text_offset == kept


def test_echo_puts_the_prompt_before_the_answer(live: Any) -> None:
    plain = complete(live, **DRAWN).choices[0].text
    assert complete(live, echo=True, **DRAWN).choices[0].text == PROMPT + plain
    assert streamed(live, live.served.encode(PROMPT), echo=True, **DRAWN)[0] == PROMPT + plain


def test_a_bias_forces_or_bans_a_token(live: Any) -> None:
    token = live.served.encode("fox")[0]
    forced = complete(live, temperature=0, max_tokens=4, logit_bias={str(token): 100})
    assert forced.choices[0].text == live.served.decode([token] * 4)
    first = complete(live, temperature=0, max_tokens=1, logprobs=1).choices[0]
    table = live.served.table
    named = next(
        i for i in range(len(live.served.tokenizer)) if table.text_of(i) == first.logprobs.tokens[0]
    )
    bias = {str(named): -100}
    banned = complete(live, temperature=0, max_tokens=1, logprobs=1, logit_bias=bias)
    assert banned.choices[0].logprobs.tokens != first.logprobs.tokens


@pytest.mark.parametrize(
    "penalty",
    [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 5.0}],
)
def test_penalties_make_repetitions_rarer(live: Any, penalty: dict[str, float]) -> None:
    # Biases that leave three tokens make every answer a repetition.
    bias = {str(token): 60 for token in (70, 71, 72)}
    fields = {"temperature": 0, "max_tokens": 12, "logit_bias": bias}
    plain = complete(live, **fields).choices[0].text
    assert complete(live, **penalty, **fields).choices[0].text != plain


@pytest.mark.parametrize("one", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}])
def test_cutting_down_to_one_token_is_greedy(live: Any, one: dict[str, float]) -> None:
    greedy = complete(live, temperature=0, max_tokens=12).choices[0].text
    assert complete(live, temperature=1, max_tokens=12, **one).choices[0].text == greedy


def test_stop_tokens_end_and_minimum_and_ignoring_put_it_off(live: Any) -> None:
    fields = {"temperature": 0, "max_tokens": 12}
    made = complete(live, logprobs=0, **fields).choices[0].logprobs.tokens
    table = live.served.table
    stop = next(
        i
        for i in range(len(live.served.tokenizer))
        if table.text_of(i) == made[3] and made.index(made[3]) == 3
    )
    stopped = complete(live, stop_token_ids=[stop], **fields)
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == 4
    later = complete(live, stop_token_ids=[stop], min_tokens=6, **fields)
    assert later.usage.completion_tokens > 6
    end = {"0": 100}
    assert complete(live, logit_bias=end, **fields).usage.completion_tokens == 1
    ignored = complete(live, logit_bias=end, ignore_eos=True, **fields)
    assert ignored.usage.completion_tokens == 12


def test_usage_comes_last_in_a_stream_that_asks_for_it(live: Any) -> None:
    fields = {**DRAWN, "n": 2, "stop": "never there"}
    whole = complete(live, **fields).usage
    chunks = list(complete(live, stream=True, stream_options={"include_usage": True}, **fields))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole
    assert whole.completion_tokens == 48
    assert {chunk.usage for chunk in complete(live, stream=True, **fields)} == {None}


def test_a_stream_ends_as_openai_ends_it(live: Any) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "stream": True, "max_tokens": 3}
    response = live.http.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert all(line.startswith("data: ") for line in response.text.split("\n\n")[:-1])


def test_texts_become_tokens_and_tokens_texts(live: Any) -> None:
    found = live.http.post("/tokenize", json={"prompt": "naïve 👩‍🚀"}).json()
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == live.served.context
    back = live.http.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": "naïve 👩‍🚀"}


def test_models_are_listed(live: Any) -> None:
    assert [model.id for model in live.client.models.list()] == ["tiny"]
    assert live.client.models.retrieve("tiny").id == "tiny"
