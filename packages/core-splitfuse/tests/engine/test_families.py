"""Every family that is served gives the tokens and logits of ``model.generate``, whatever else runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from core.engines import Request, Sampling, Token
from core.engines.plain import PlainEngine
from core.testing import tiny
from core_splitfuse import Engine

NEW = 16

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny.llama,
    "qwen2": lambda: tiny.build("Qwen2"),
    "qwen2 window": lambda: tiny.build(
        "Qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen3": tiny.qwen3,
    "phi": lambda: tiny.build("Phi", seed=2),
    "phi3": tiny.phi3,
    "phi3 window": lambda: tiny.phi3(sliding_window=16),
    "phi3 longrope": tiny.longrope,
    "mistral": tiny.mistral,
    "gpt2": lambda: tiny.build("GPT2"),
    "opt": lambda: tiny.build("OPT"),
    "gpt_neox": lambda: tiny.build("GPTNeoX"),
    "gemma2": lambda: tiny.build("Gemma2", sliding_window=16),
    "gemma3": lambda: tiny.build("Gemma3Text", sliding_window=16),
    "mixtral": lambda: tiny.build("Mixtral"),
    "gpt_oss": lambda: tiny.build("GptOss", sliding_window=16),
    "deepseek_v3": lambda: tiny.build("DeepseekV3"),
}


class Answer(NamedTuple):
    """Token ids, and the log-probabilities (T, vocabulary) that they were taken from."""

    ids: list[int]
    logprobs: Tensor


@cache
def model_of(family: str) -> nn.Module:
    return FAMILIES[family]()


def prompts() -> list[list[int]]:
    """Six prompts of 5 to 40 tokens; the longer ones leave the windows."""
    return tiny.prompts(6)


@cache
def by_transformers(family: str) -> list[Answer]:
    model: Any = model_of(family)
    return [generated(model, prompt, NEW) for prompt in prompts()]


def generated(model: Any, prompt: list[int], new: int) -> Answer:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack([step[0] for step in out.logits]).float()
    return Answer(out.sequences[0, len(prompt) :].tolist(), logits.log_softmax(-1))


def drive(engine: Engine | PlainEngine, requests: list[Request]) -> list[list[Token]]:
    """Tokens of every request."""
    numbers = [engine.add(request) for request in requests]
    made: dict[int, list[Token]] = {number: [] for number in numbers}
    while engine.busy:
        for token in engine.step():
            made[token.request].append(token)
    return [made[number] for number in numbers]


def require_same(made: list[Token], wanted: Answer) -> None:
    """The same tokens, and the same logits within 1e-4 of their scale."""
    assert [token.id for token in made] == wanted.ids
    for token, logprobs in zip(made, wanted.logprobs, strict=True):
        for number, value in token.top:
            assert value == pytest.approx(float(logprobs[number]), abs=1e-4, rel=1e-4)


def greedy(prompt: list[int], new: int = NEW, **extras: object) -> Request:
    sampling = Sampling(max_new_tokens=new, top_logprobs=64)
    return Request(prompt=prompt, sampling=sampling, extras=extras)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_in_chunks_beside_others(family: str) -> None:
    wanted = by_transformers(family)
    with Engine(model_of(family), budget=7) as engine:
        made = drive(engine, [greedy(prompt) for prompt in prompts()])
        for tokens, answer in zip(made, wanted, strict=True):
            require_same(tokens, answer)
        assert engine.stats().kv_used == 0
    assert len({number for answer in wanted for number in answer.ids}) > 10


def test_evicted_and_computed_anew(family: str) -> None:
    with Engine(model_of(family), budget=64, kv_tokens=72, block_size=4) as engine:
        made = drive(engine, [greedy(prompt) for prompt in prompts()])
        for tokens, answer in zip(made, by_transformers(family), strict=True):
            require_same(tokens, answer)
        assert engine.stats().evictions > 0
        assert engine.stats().kv_used == 0


def test_with_a_cached_beginning(family: str) -> None:
    with Engine(model_of(family), budget=64, block_size=4) as engine:
        drive(engine, [greedy(prompt) for prompt in prompts()])
        for prompt in prompts()[2:]:
            longer = [*prompt, 7, 8, 9]
            before = engine.stats().reused_tokens
            (tokens,) = drive(engine, [greedy(longer)])
            require_same(tokens, generated(model_of(family), longer, NEW))
            # Of another regime of frequencies nothing may be taken.
            crosses = family == "phi3 longrope" and len(prompt) <= 16 < len(longer)
            assert engine.stats().reused_tokens > before or crosses


def test_several_samples_of_one_prompt(family: str) -> None:
    model, prompt = model_of(family), prompts()[4]
    drawn = [
        Request(prompt=prompt, sampling=Sampling(max_new_tokens=NEW, temperature=1.0, seed=seed))
        for seed in range(3)
    ]
    with Engine(model, budget=16, block_size=16) as engine:
        greedily, *made = drive(engine, [greedy(prompt), *drawn])
        assert engine.stats().prompt_tokens == 4 * len(prompt)
        # Three of the four were not computed.
        new = 4 * (NEW - 1)
        assert engine.stats().passes <= -(-(len(prompt) + new) // 4) + 2
    require_same(greedily, by_transformers(family)[4])
    with PlainEngine(model) as plain:
        alone = drive(plain, drawn)
    for tokens, reference in zip(made, alone, strict=True):
        assert [token.id for token in tokens] == [token.id for token in reference]
    assert len({tuple(token.id for token in tokens) for tokens in made}) == 3
