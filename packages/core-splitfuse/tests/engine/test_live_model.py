"""The engine on a module that lives on: trains, gets adapters, policies of positions, new weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import core
from core.attention import use_attention
from core.engines import Request, Sampling, generate
from core.engines.plain import PlainEngine
from core.positions.install import positions
from core.positions.policy import ModelPositions
from core.positions.tokens import Tokens
from core.testing import tiny
from core_splitfuse import Engine

PROMPT = tiny.prompts(5)[4]
GREEDY = Sampling(max_new_tokens=10)


def answer(engine: core.Engine, *prompts: list[int]) -> list[tuple[int, ...]]:
    return [found.ids for found in generate(engine, prompts or [PROMPT], GREEDY)]


def trained(model: nn.Module, *, serving: bool) -> list[Tensor]:
    """Two steps of training, with or without answering between them."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = Engine(model, block_size=4) if serving else None
    losses = []
    for _ in range(3):
        loss = model(**tiny.batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if engine is not None:
            assert answer(engine) == answer(PlainEngine(model))
    return losses


def test_training_goes_on_undisturbed_and_answers_follow_it() -> None:
    model = tiny.llama().train()
    pointers = [p.data_ptr() for p in model.parameters()]
    served = trained(model, serving=True)
    alone = trained(tiny.llama().train(), serving=False)
    assert all(torch.equal(a, b) for a, b in zip(served, alone, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_a_change_of_weights_in_the_middle_of_an_answer() -> None:
    model, other = tiny.llama(), tiny.llama(seed=7)
    with Engine(model) as engine:
        number = engine.add(Request(prompt=PROMPT, sampling=GREEDY))
        made = [*engine.step(), *engine.step(), *engine.step()]
        with torch.no_grad():
            for own, new in zip(model.parameters(), other.parameters(), strict=True):
                own.copy_(new)  # nobody tells the engine
        while engine.busy:
            made += engine.step()
    old = [token.id for token in made if token.weights == 0]
    new = [token.id for token in made if token.weights == 1]
    assert len(old) == 3
    assert {token.request for token in made} == {number}
    reference = generate(PlainEngine(other), [[*PROMPT, *old]], Sampling(max_new_tokens=7))
    assert tuple(new) == reference[0].ids


def test_an_adapter_that_is_switched_shares_nothing() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny.llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    with Engine(model, block_size=4) as engine:
        plain = PlainEngine(model)
        first = answer(engine)
        assert first == answer(plain)
        with model.disable_adapter():
            assert answer(engine) == answer(plain) != first
        assert answer(engine) == first
        assert engine.stats().reused_tokens == 0


class Stretched:
    """Divides positions by a ratio for every head."""

    name, atomic_prefill = "stretched", False

    def __init__(self, *ratios: float) -> None:
        self.ratios = ratios

    def digest(self) -> str:
        return str(self.ratios)

    def begin(self, *_: Any) -> None:
        pass

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        ratios = torch.tensor(self.ratios).view(1, -1, 1)
        return tokens.rotate(module, x, tokens.positions.unsqueeze(1) / ratios)


class ByTheLast(Stretched):
    """Decides its ratios by the prompt, which it must see whole."""

    name, atomic_prefill = "by the last", True

    def begin(
        self, module: nn.Module, query: Tensor, key: Tensor, visible: Tensor, requests: Any
    ) -> None:
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3)
        scores = scores.squeeze(2).masked_fill(~visible.unsqueeze(1), -torch.inf)
        for row, request in enumerate(requests):
            strength = scores[row].softmax(-1).amax(-1)
            request.kept[module.layer_idx] = 1 + strength.argsort().argsort() * 0.3

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        ratios = torch.stack([r.kept[module.layer_idx] for r in tokens.requests])
        positions = tokens.positions.unsqueeze(1) / ratios.unsqueeze(-1)
        return tokens.rotate(module, x, positions)


@pytest.mark.parametrize("family", ["Llama", "Phi3", "GPTNeoX"])
@pytest.mark.parametrize("policy", [Stretched(1.0, 1.5, 2.0, 3.0), ByTheLast()])
def test_a_policy_of_positions_in_force(family: str, policy: Any) -> None:
    model = tiny.build(family)
    prompts = tiny.prompts(5)
    without = answer(PlainEngine(model), *prompts)
    with positions(model, policy):
        wanted = answer(PlainEngine(model), *prompts)
        assert wanted != without
        # So little room that requests are computed anew.
        with Engine(model, budget=12, kv_tokens=60, block_size=4) as engine:
            assert answer(engine, *prompts) == wanted
            assert engine.stats().evictions > 0


def test_requests_bring_policies_of_their_own() -> None:
    model = tiny.llama()
    policies = [None, Stretched(2.0, 2.0, 2.0, 2.0), Stretched(1.0, 1.5, 2.0, 3.0), ByTheLast()]
    wanted = []
    for policy in policies:
        with positions(model, policy or ModelPositions()):
            wanted += answer(PlainEngine(model))
    assert len(set(wanted)) == len(policies)
    with Engine(model, unrotated_keys=True, budget=16, block_size=4) as engine:
        requests = [
            Request(prompt=PROMPT, sampling=GREEDY, extras={"positions": policy})
            for policy in policies
        ]
        for _ in range(2):
            assert [found.ids for found in generate(engine, requests)] == wanted
        assert engine.stats().reused_tokens > 0
    with Engine(model) as engine, pytest.raises(core.EngineError, match="unrotated_keys"):
        engine.add(requests[1])


def test_drifting_frequencies_are_those_of_generate() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model: Any = tiny.llama(rope_parameters=rope, max_position_embeddings=24)
    model.config.max_position_embeddings = 256
    prompts = tiny.prompts(6)
    wanted = [answer(PlainEngine(copy.deepcopy(model)), prompt)[0] for prompt in prompts]
    with Engine(model, budget=64, kv_tokens=72, block_size=4) as engine:
        assert answer(engine, *prompts) == wanted
        assert engine.stats().evictions > 0


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("Bloom", "BloomModel does not use"),
        ("Falcon", "FalconModel does not use"),
        ("GPTJ", "GPTJModel does not use"),
        ("Mpt", "MptModel does not use"),
        ("Mamba", "MambaForCausalLM .* 'linear_attention'"),
        ("T5", "T5ForConditionalGeneration .* encoder"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(family: str, reason: str) -> None:
    model = tiny.build(family)
    with pytest.raises(core.CoreError, match=reason):
        Engine(model)


def test_a_layer_that_computes_something_else_is_refused() -> None:
    model: Any = tiny.llama()
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # A row of its own for every sequence is taken for granted here.
        kwargs["position_embeddings"] = tuple(
            torch.roll(table, 1, dims=1) for table in kwargs["position_embeddings"]
        )
        return original(*args, **kwargs)

    attention.forward = forward
    with pytest.raises(core.ModelError, match="layer 1"):
        Engine(model)


def test_the_attention_works_in_passes_only() -> None:
    model: Any = tiny.llama()
    Engine(model).close()
    with (
        use_attention(model, "core_splitfuse"),
        pytest.raises(core.ModelError, match="outside of an engine's pass"),
    ):
        model(torch.tensor([[1, 2]]))
