"""The plain engine through the engine contract, on real transformers models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import core
from core.engines import Sampling, generate
from core.engines.plain import PlainEngine
from core.engines.sampling import draw
from core.positions.install import positions
from core.positions.policy import ModelPositions
from core.settings import check
from core.testing.tiny import build, longrope, prompts

PROMPTS = [[5, 9, 17, 3], [8], [40, 2, 2, 61, 7, 30, 1]]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("Llama")


def by_transformers(model: nn.Module, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return [int(token) for token in out[0, len(prompt) :]]


def without_cache(model: nn.Module, prompt: list[int], new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def longrope_llama() -> nn.Module:
    like: Any = longrope()
    return build("Llama", rope_parameters=dict(like.config.rope_parameters))


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Qwen3", "Mistral"])
def test_greedy_is_what_transformers_generates(family: str) -> None:
    model = build(family)
    engine = PlainEngine(model)
    answers = generate(engine, PROMPTS, Sampling(max_new_tokens=16))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert list(answer.ids) == by_transformers(model, prompt, 16)
        assert answer.finish == "length"
    assert len({token for answer in answers for token in answer.ids}) > 10


@pytest.mark.parametrize("family", ["Phi3", "Llama"])
def test_a_change_of_frequencies_drops_the_cache(family: str) -> None:
    model = longrope() if family == "Phi3" else longrope_llama()
    for prompt in prompts(4):
        (answer,) = generate(PlainEngine(model), [prompt], Sampling(max_new_tokens=14))
        assert list(answer.ids) == without_cache(model, prompt, 14)
        if family == "Phi3":
            assert list(answer.ids) == by_transformers(model, prompt, 14)
            with positions(model, ModelPositions()):
                (under,) = generate(PlainEngine(model), [prompt], Sampling(max_new_tokens=14))
            assert under.ids == answer.ids


def test_frequencies_that_drift_keep_the_cache() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    model: Any = build("Llama", rope_parameters=rope, max_position_embeddings=16)
    model.config.max_position_embeddings = 256
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, named: passes.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    generate(PlainEngine(model), [[1] * 12], Sampling(max_new_tokens=8))
    assert passes == [12] + [1] * 7


def test_identity_tells_models_and_policies_apart(model: nn.Module) -> None:
    engine = PlainEngine(model)
    salts = {engine.identity.salt(), PlainEngine(build("Qwen3")).identity.salt()}
    with positions(model, ModelPositions()):
        salts.add(engine.identity.salt())
    engine.weights_changed()
    salts.add(engine.identity.salt())
    assert len(salts) == 4
    assert PlainEngine(build("Llama", seed=1)).identity.model == engine.identity.model


def test_logprobs_are_those_of_the_model(model: nn.Module) -> None:
    (answer,) = generate(PlainEngine(model), [PROMPTS[0]], Sampling(max_new_tokens=5))
    whole = torch.tensor([PROMPTS[0] + list(answer.ids)])
    with torch.no_grad():
        reference = model(whole).logits[0].double().log_softmax(-1)
    for index, (token, logprob) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
        expected = float(reference[len(PROMPTS[0]) + index - 1, token])
        assert logprob == pytest.approx(expected, abs=1e-4)


def test_a_seed_gives_the_same_tokens_whatever_else_runs(model: nn.Module) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, top_k=50, seed=3)
    (alone,) = generate(PlainEngine(model), [PROMPTS[0]], sampling)
    among = generate(PlainEngine(model), PROMPTS, sampling)
    assert among[0] == alone
    other = check(Sampling, max_new_tokens=12, temperature=1.0, seed=4)
    assert generate(PlainEngine(model), [PROMPTS[0]], other)[0].ids != alone.ids


def test_stop_ids_end_an_answer(model: nn.Module) -> None:
    (free,) = generate(PlainEngine(model), [PROMPTS[0]], Sampling(max_new_tokens=8))
    stop = free.ids[3]
    sampling = Sampling(max_new_tokens=8, stop_ids=(stop,))
    (answer,) = generate(PlainEngine(model), [PROMPTS[0]], sampling)
    assert answer.finish == "stop"
    assert answer.ids == free.ids[: free.ids.index(stop) + 1]


def test_a_cancelled_request_ends_and_the_others_go_on(model: nn.Module) -> None:
    engine = PlainEngine(model)
    first, second = (engine.add(core.Request(prompt=prompt)) for prompt in PROMPTS[:2])
    engine.step()
    engine.cancel(first)
    engine.cancel(12345)
    ended = {token.request: token for token in engine.step()}
    assert (ended[first].finish, ended[first].id) == ("cancelled", -1)
    assert ended[second].finish is None
    assert {token.request for token in engine.step()} == {second}


@pytest.mark.parametrize(
    ("prompt", "extras", "reason"),
    [
        ([], {}, "empty"),
        ([1, 10_000], {}, "token 10000"),
        ([-1], {}, "token -1"),
        ([1] * 10_000, {}, "do not fit"),
        ([1], {"deadline": 3}, "deadline"),
    ],
)
def test_bad_requests_are_refused(
    model: nn.Module, prompt: list[int], extras: dict[str, object], reason: str
) -> None:
    engine = PlainEngine(model)
    with pytest.raises(core.EngineError, match=reason):
        engine.add(core.Request(prompt=prompt, extras=extras))
    assert engine.step() == []


def test_a_model_that_cannot_generate_is_refused() -> None:
    with pytest.raises(core.EngineError, match="Linear"):
        PlainEngine(nn.Linear(2, 2))


def test_training_the_module_changes_what_the_engine_says(model: nn.Module) -> None:
    live = copy.deepcopy(model).train()
    engine = PlainEngine(live)
    before = engine.identity.salt()
    (old,) = generate(engine, [PROMPTS[0]], Sampling(max_new_tokens=8))
    assert live.training
    weights = [(n, torch.randn_like(p) * 0.25) for n, p in live.named_parameters()]
    engine.load_weights(weights)
    (new,) = generate(engine, [PROMPTS[0]], Sampling(max_new_tokens=8))
    assert old.ids != new.ids
    assert (old.weights[0], new.weights[0]) == (0, 1)
    assert engine.identity.salt() != before
    assert list(new.ids) == by_transformers(live.eval(), PROMPTS[0], 8)


def test_wrong_weights_change_nothing(model: nn.Module) -> None:
    live = copy.deepcopy(model)
    engine = PlainEngine(live)
    name, weight = next(iter(live.named_parameters()))
    for wrong in [("nowhere", weight), (name, weight[:1])]:
        with pytest.raises(core.EngineError, match=wrong[0]):
            engine.load_weights([(name, torch.zeros_like(weight)), wrong])
    assert torch.equal(weight, dict(model.named_parameters())[name])


def test_weights_that_are_not_finite_end_the_request(model: nn.Module) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    (answer,) = generate(PlainEngine(broken), [PROMPTS[0]])
    assert (answer.finish, answer.ids) == ("error", ())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.1, 5.0),
)
def test_drawn_tokens_are_among_those_kept(
    seed: int, top_k: int, top_p: float, temperature: float
) -> None:
    logits = torch.randn(16, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    token, logprob = draw(logits, sampling, torch.Generator().manual_seed(seed))
    order = logits.argsort(descending=True).tolist()
    probabilities = (logits / temperature).double().softmax(-1)
    rank = order.index(token)
    assert top_k == 0 or rank < top_k
    if top_k == 0:
        assert float(probabilities[order[:rank]].sum()) < top_p + 1e-6
    assert logprob <= 1e-6


def test_a_refused_prompt_leaves_no_other_behind(model: nn.Module) -> None:
    engine = PlainEngine(model)
    with pytest.raises(core.EngineError, match="empty"):
        generate(engine, [PROMPTS[0], PROMPTS[1], []])
    assert engine.step() == []


def test_a_failing_forward_ends_its_request_only(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    broken = copy.deepcopy(model)
    original = broken.forward

    def forward(*args: object, **kwargs: object) -> object:
        if kwargs["input_ids"].shape[1] == len(PROMPTS[2]):  # type: ignore[attr-defined]
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    broken.forward = forward  # type: ignore[method-assign]
    good, bad = generate(PlainEngine(broken), [PROMPTS[0], PROMPTS[2]], Sampling(max_new_tokens=4))
    assert (good.finish, len(good.ids)) == ("length", 4)
    assert (bad.finish, bad.ids) == ("error", ())
    assert "out of memory" in caplog.text
