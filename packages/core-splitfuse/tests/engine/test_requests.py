"""Requests that end early, fail, hurry or share: nobody else notices, and nothing stays behind."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

import core
from core.engines import Request, Sampling, Token, generate
from core.engines.plain import PlainEngine
from core.testing import tiny
from core_splitfuse import Engine

PROMPTS = tiny.prompts(5)
GREEDY = Sampling(max_new_tokens=10)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.llama()


@pytest.fixture(scope="module")
def wanted(model: nn.Module) -> list[tuple[int, ...]]:
    return [answer.ids for answer in generate(PlainEngine(model), PROMPTS, GREEDY)]


def drain(engine: Engine) -> dict[int, list[Token]]:
    made: dict[int, list[Token]] = {}
    while engine.busy:
        for token in engine.step():
            made.setdefault(token.request, []).append(token)
    return made


def ids(tokens: list[Token]) -> tuple[int, ...]:
    return tuple(token.id for token in tokens if token.id >= 0)


def test_blocks_of_a_cancelled_request_are_free_in_the_next_step(model: nn.Module) -> None:
    with Engine(model, budget=16) as engine:
        number = engine.add(Request(prompt=PROMPTS[4], sampling=GREEDY))
        engine.step()
        assert engine.stats().kv_used > 0
        engine.cancel(number)
        (last,) = engine.step()
        assert (last.finish, last.id) == ("cancelled", -1)
        assert engine.stats().kv_used == 0
        assert not engine.busy


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_whoever_of_several_samples_leaves_the_others_stay(
    model: nn.Module, wanted: list[tuple[int, ...]], gone: int
) -> None:
    with Engine(model, budget=4) as engine:
        numbers = [engine.add(Request(prompt=PROMPTS[4], sampling=GREEDY)) for _ in range(3)]
        first = engine.step()
        engine.cancel(numbers[gone])
        made = drain(engine)
    assert first == []
    for index, number in enumerate(numbers):
        assert ids(made[number]) == (() if index == gone else wanted[4])


def test_a_deadline_ends_a_request(model: nn.Module, wanted: list[tuple[int, ...]]) -> None:
    with Engine(model) as engine:
        late = engine.add(Request(prompt=PROMPTS[0], sampling=GREEDY, extras={"deadline": 0.0}))
        other = engine.add(Request(prompt=PROMPTS[1], sampling=GREEDY, extras={"deadline": 600}))
        made = drain(engine)
    assert [token.finish for token in made[late]] == ["cancelled"]
    assert ids(made[other]) == wanted[1]


def test_the_more_urgent_request_comes_first(model: nn.Module) -> None:
    with Engine(model, budget=8, partial_prompts=1) as engine:
        usual = [engine.add(Request(prompt=p, sampling=GREEDY)) for p in PROMPTS[2:4]]
        urgent = engine.add(Request(prompt=PROMPTS[4], sampling=GREEDY, extras={"priority": 1}))
        order = list(drain(engine))
    assert order.index(urgent) < min(map(order.index, usual))


def test_an_atomic_prompt_is_computed_in_one_pass(
    model: nn.Module, wanted: list[tuple[int, ...]]
) -> None:
    with Engine(model, budget=8) as engine:
        number = engine.add(
            Request(prompt=PROMPTS[4], sampling=GREEDY, extras={"atomic_prefill": True})
        )
        assert len(PROMPTS[4]) > 8
        (first,) = engine.step()
        made = drain(engine)
    assert (first.id, *ids(made[number])) == wanted[4]


def test_only_equal_salts_share_a_beginning(model: nn.Module) -> None:
    prompt = list(range(1, 40))
    with Engine(model, block_size=4) as engine:
        for salt, reused in [("a", 0), ("a", 36), ("b", 36), (None, 36), ("b", 72)]:
            request = Request(prompt=prompt, sampling=GREEDY, extras={"cache_salt": salt})
            generate(engine, [request])
            assert engine.stats().reused_tokens == reused


def test_nothing_is_shared_without_a_prefix_cache(model: nn.Module) -> None:
    with Engine(model, block_size=4, prefix_cache=False) as engine:
        for _ in range(2):
            generate(engine, [list(range(1, 40))], GREEDY)
        assert engine.stats().reused_tokens == 0


@pytest.mark.parametrize(
    ("extras", "reason"),
    [
        ({"priority": "high"}, "priority must be int, not str"),
        ({"positions": 3}, "positions must be Positions"),
        ({"prioritty": 1}, "does not know prioritty"),
    ],
)
def test_wrong_extras_are_refused(model: nn.Module, extras: dict[str, object], reason: str) -> None:
    with Engine(model) as engine, pytest.raises(core.EngineError, match=reason):
        engine.add(Request(prompt=[1], extras=extras))


def test_what_never_fits_is_refused_with_both_numbers(model: nn.Module) -> None:
    with Engine(model, kv_tokens=64) as engine:
        with pytest.raises(core.EngineError, match=r"60 prompt tokens and 10 new .* 64 tokens"):
            engine.add(Request(prompt=[1] * 60, sampling=GREEDY))
        with pytest.raises(core.EngineError, match=r"250 prompt tokens and 10 new .* 256"):
            engine.add(Request(prompt=[1] * 250, sampling=GREEDY))
        assert not engine.busy


class Failing(nn.Module):
    """Fails, or says nothing, for a pass with a certain token in it."""

    def __init__(self, model: Any, token: int, *, error: bool) -> None:
        super().__init__()
        self.original, self.token, self.error = model.forward, token, error

    def forward(self, **inputs: Any) -> Any:
        out = self.original(**inputs)
        found = inputs["input_ids"][0] == self.token
        if self.error and found.any():
            raise RuntimeError("out of memory")
        # One row of logits for every sequence: those whose tokens came before it stay right.
        ends = inputs["logits_to_keep"]
        starts = torch.cat([ends.new_zeros(1), ends[:-1] + 1])
        for row, (begin, end) in enumerate(zip(starts, ends, strict=True)):
            if found[int(begin) : int(end) + 1].any():
                out.logits[:, row] = torch.nan
        return out


@pytest.mark.parametrize("error", [True, False])
def test_a_request_that_fails_harms_nobody_else(
    model: nn.Module, wanted: list[tuple[int, ...]], error: bool, caplog: pytest.LogCaptureFixture
) -> None:
    broken: Any = copy.deepcopy(model)
    bad = next(token for token in range(1, 96) if all(token not in a for a in (*wanted, *PROMPTS)))
    with Engine(broken, budget=64) as engine, caplog.at_level(logging.CRITICAL, "core"):
        broken.forward = Failing(broken, bad, error=error).forward
        numbers = [engine.add(Request(prompt=p, sampling=GREEDY)) for p in PROMPTS[:3]]
        wrong = engine.add(Request(prompt=[5, bad], sampling=GREEDY))
        made = drain(engine)
        assert engine.stats().kv_used == 0
    assert [token.finish for token in made[wrong]] == ["error"]
    assert [ids(made[number]) for number in numbers] == wanted[:3]


def test_no_evict_sets_aside_what_may_be_reached(
    model: nn.Module, wanted: list[tuple[int, ...]]
) -> None:
    with Engine(model, kv_tokens=64, block_size=4, admission="no_evict") as engine:
        answers = generate(engine, [*PROMPTS, *PROMPTS], GREEDY)
        assert engine.stats().evictions == 0
    assert [answer.ids for answer in answers] == wanted * 2
