"""How tokens are drawn: against transformers' own processors of logits, and what must never come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import generation

import core
from core.engines import Request, Sampling, generate
from core.engines.plain import PlainEngine
from core.engines.sampling import Answer, Drawn, draw_each
from core.settings import check
from core.testing import tiny

PROMPT = [3, 5, 5, 9]


def random_logits(seed: int) -> Tensor:
    return 3 * torch.randn(24, generator=torch.Generator().manual_seed(seed))


def best(sampling: Sampling, logits: Tensor, made: tuple[int, ...] = ()) -> int:
    """What comes after some tokens, drawn greedily."""
    answer = Answer(Request(prompt=PROMPT, sampling=sampling))
    for token in made:
        answer.draw(torch.nn.functional.one_hot(torch.tensor(token), 24).float() * 1000)
    assert answer.tokens == list(made)
    return answer.draw(logits).id


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), penalty=st.floats(0.2, 4))
def test_the_repetition_penalty_is_that_of_transformers(seed: int, penalty: float) -> None:
    logits = random_logits(seed)
    made = (7, 7, 2)
    processor = generation.RepetitionPenaltyLogitsProcessor(penalty)
    ids = torch.tensor([[*PROMPT, *made]])
    wanted = int(processor(ids, logits.clone()[None]).argmax())  # type: ignore[arg-type]
    assert best(Sampling(repetition_penalty=penalty), logits, made) == wanted


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), presence=st.floats(-2, 2), frequency=st.floats(-2, 2))
def test_penalties_count_the_answer_and_not_the_prompt(
    seed: int, presence: float, frequency: float
) -> None:
    logits = random_logits(seed)
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    made = (7, 7, 2)
    expected = logits.clone()
    expected[7] -= presence + 2 * frequency
    expected[2] -= presence + frequency
    assert best(sampling, logits, made) == int(expected.argmax())
    assert best(sampling, logits) == int(logits.argmax())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 1))
def test_what_is_much_less_likely_is_never_drawn(seed: int, share: float) -> None:
    logits = random_logits(seed)
    warper = generation.MinPLogitsWarper(share)
    kept = warper(torch.tensor([PROMPT]), logits[None].clone())[0] > -torch.inf  # type: ignore[arg-type]
    sampling = Sampling(temperature=1.0, min_p=share, seed=seed % 1000, max_new_tokens=40)
    answer = Answer(Request(prompt=PROMPT, sampling=sampling))
    assert all(kept[answer.draw(logits).id] for _ in range(20))


def test_biased_tokens_come_or_stay_away() -> None:
    logits = random_logits(0)
    first = int(logits.argmax())
    assert best(Sampling(logit_bias={first: -100.0}), logits) != first
    assert best(Sampling(logit_bias={4: 100.0}), logits) == 4


def test_a_stop_id_waits_for_the_least_number_of_tokens() -> None:
    logits = random_logits(1)
    stop = int(logits.argmax())
    sampling = Sampling(min_new_tokens=3, stop_ids=(stop,), max_new_tokens=9)
    answer = Answer(Request(prompt=PROMPT, sampling=sampling))
    drawn = [answer.draw(logits) for _ in range(4)]
    assert [each.id == stop for each in drawn] == [False, False, False, True]
    assert drawn[-1].finish == "stop"


class Alternating:
    """Even tokens and odd ones in turn."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> Tensor:
        return torch.arange(tiny.VOCABULARY) % 2 == len(self.seen) % 2

    def accept(self, token: int) -> None:
        self.seen.append(token)


class Nothing(Alternating):
    def allowed(self) -> Tensor:
        return torch.zeros(tiny.VOCABULARY, dtype=torch.bool)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_keeps_to_its_constraint(temperature: float) -> None:
    constraint = Alternating()
    sampling = Sampling(max_new_tokens=8, temperature=temperature)
    request = Request(prompt=PROMPT, sampling=sampling, constraint=constraint)
    with PlainEngine(tiny.llama()) as engine:
        (answer,) = generate(engine, [request])
    assert [token % 2 for token in answer.ids] == [0, 1] * 4
    assert tuple(constraint.seen) == answer.ids


def test_a_constraint_that_allows_nothing_ends_the_request() -> None:
    request = Request(prompt=PROMPT, constraint=Nothing())
    with PlainEngine(tiny.llama()) as engine:
        answers = generate(engine, [request, PROMPT], Sampling(max_new_tokens=3))
    assert [answer.finish for answer in answers] == ["error", "length"]


def test_the_most_likely_tokens_are_told_as_the_model_says() -> None:
    model: Any = tiny.llama()
    sampling = Sampling(max_new_tokens=1, temperature=3.0, seed=5, top_k=3, top_logprobs=4)
    with PlainEngine(model) as engine:
        engine.add(Request(prompt=PROMPT, sampling=sampling))
        (token,) = engine.step()
    with torch.no_grad():
        logprobs = model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    expected = logprobs.topk(4)
    assert [number for number, _ in token.top[1:]] == expected.indices.tolist()
    assert token.top[0][0] == token.id
    for number, value in token.top:
        assert value == pytest.approx(float(logprobs[number]), abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 65}, "top_logprobs"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(core.SettingsError, match=reason):
        check(Sampling, **changes)


@pytest.mark.parametrize("changes", [{"logit_bias": {999: 1.0}}, {"stop_ids": (999,)}])
def test_ids_that_the_model_does_not_have_are_refused(changes: dict[str, Any]) -> None:
    with PlainEngine(tiny.llama()) as engine, pytest.raises(core.EngineError, match="token 999"):
        engine.add(Request(prompt=PROMPT, sampling=Sampling(**changes)))


def test_an_engine_tells_what_it_did() -> None:
    with PlainEngine(tiny.llama()) as engine:
        number = engine.add(Request(prompt=PROMPT))
        assert engine.busy
        engine.step()
        assert (engine.stats().running, engine.stats().kv_used) == (1, len(PROMPT))
        engine.cancel(number)
        engine.step()
        stats = engine.stats()
        assert not engine.busy
    assert (stats.passes, stats.prompt_tokens, stats.new_tokens) == (1, len(PROMPT), 1)
    assert stats.ended == {"cancelled": 1}


def test_many_answers_are_drawn_as_each_alone() -> None:
    samplings = [
        Sampling(),
        Sampling(temperature=1.0, seed=3),
        Sampling(),
        Sampling(stop_ids=(0,), min_new_tokens=2),
        Sampling(top_logprobs=2),
    ]
    rows = torch.stack([random_logits(seed) for seed in range(5)])
    rows[2, 4] = torch.nan

    def answers() -> list[Answer]:
        return [Answer(Request(prompt=PROMPT, sampling=sampling)) for sampling in samplings]

    together = draw_each(rows.double(), answers())
    for index, (answer, found) in enumerate(zip(answers(), together, strict=True)):
        if index == 2:
            assert isinstance(found, core.EngineError)
            continue
        alone = answer.draw(rows[index])
        assert isinstance(found, Drawn)
        assert found._replace(logprob=0) == alone._replace(logprob=0)
        assert found.logprob == pytest.approx(alone.logprob, abs=1e-5)
