"""Other policies of positions: what they see, what they change, and for whom."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.positions.install import positions, positions_transform
from core.positions.policy import ModelPositions, Positions
from core.positions.rotary import Rotary
from core.positions.tokens import RequestState, Tokens
from core.testing.tiny import build as build_family, left_padded as prompts

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 5.0, 9.0, 16.0],
    "original_max_position_embeddings": 16,
}


def build(family: str, **changes: Any) -> Any:
    return build_family(family, **changes)


def generate(model: Any, new: int = 16, **options: Any) -> Tensor:
    given: Tensor = model.generate(**prompts(), max_new_tokens=new, do_sample=False, **options)
    return given[:, 14:]


@torch.no_grad()
def logits(model: Any, **inputs: Tensor) -> Tensor:
    found: Tensor = model(**(inputs or prompts())).logits
    return found


class Interpolated:
    """Divides positions by a ratio, one for each head or one for all."""

    name = "interpolated"
    atomic_prefill = False

    def __init__(self, ratio: float | Tensor) -> None:
        self.ratio = ratio

    def digest(self) -> str:
        return str(self.ratio)

    def begin(self, *_: Any) -> None:
        pass

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        at = tokens.positions
        if isinstance(self.ratio, Tensor):
            return tokens.rotate(module, x, at.unsqueeze(1) / self.ratio.view(1, -1, 1))
        return tokens.rotate(module, x, at / self.ratio)


class Recorder(ModelPositions):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self.lengths: list[list[int]] = []

    def begin(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        visible: Tensor,
        requests: Sequence[RequestState],
    ) -> None:
        index: Any = module.layer_idx
        self.seen.append((index, query, key, visible))
        for request in requests:
            assert index not in request.kept
            request.kept[index] = True

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        assert all(module.layer_idx in request.kept for request in tokens.requests)
        self.lengths.append([request.length for request in tokens.requests])
        return super().rotate(module, x, tokens)


def test_interpolation_depends_on_position_over_ratio_only() -> None:
    model = build("Llama")
    ids = prompts()["input_ids"][:1]
    at = torch.arange(14).unsqueeze(0)
    plain = logits(model, input_ids=ids)
    with positions(model, Interpolated(1.0)):
        torch.testing.assert_close(logits(model, input_ids=ids), plain, atol=1e-5, rtol=1e-5)
    with positions(model, Interpolated(2.0)):
        assert (logits(model, input_ids=ids) - plain).abs().max() > 0.1
        # A jump in positions would be read as packed rows: give the mask that says it is one row.
        visible = torch.ones(14, 14, dtype=torch.bool).tril()[None, None]
        same = logits(model, input_ids=ids, position_ids=at * 2, attention_mask=visible)
        torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "Glm4"])
def test_interpolated_generation_with_cache_equals_without(kind: str) -> None:
    model = build(kind)
    with positions(model, Interpolated(1.7)):
        assert torch.equal(generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize("heads", [2, 4])
def test_ratios_by_head(heads: int) -> None:
    model = build("Llama")
    real = prompts()["attention_mask"].bool()
    with positions(model, Interpolated(3.0)):
        uniform = logits(model)
    # With a ratio for every query head, keys come back with a head for every query head.
    policy = Interpolated(torch.full((4,), 3.0))
    if heads == 2:
        policy = ByKeyHead(torch.full((2,), 3.0))
    with positions(model, policy):
        torch.testing.assert_close(logits(model)[real], uniform[real], atol=1e-5, rtol=1e-5)
        assert torch.equal(generate(model), generate(model, use_cache=False))
    policy.ratio = torch.linspace(1.0, 2.0, heads)
    with positions(model, policy):
        assert (logits(model) - uniform).abs().max() > 0.1
        assert torch.equal(generate(model), generate(model, use_cache=False))


class ByKeyHead(Interpolated):
    """One ratio for each key head, shared by its group of queries."""

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        assert isinstance(self.ratio, Tensor)
        ratio = self.ratio.repeat_interleave(x.shape[1] // len(self.ratio)).view(1, -1, 1)
        return tokens.rotate(module, x, tokens.positions.unsqueeze(1) / ratio)


def test_begin_sees_the_prompt_once_per_layer() -> None:
    model = build("Llama")
    policy = Recorder()
    with positions(model, policy):
        generate(model, new=3)
        assert [index for index, *_ in policy.seen] == [0, 1, 2]
        generate(model, new=3)
    assert [index for index, *_ in policy.seen] == [0, 1, 2, 0, 1, 2]
    _, query, key, visible = policy.seen[0]
    assert query.shape == (2, 4, 1, 8)
    assert key.shape == (2, 2, 14, 8)
    assert torch.equal(visible, prompts()["attention_mask"].bool())
    assert policy.lengths[0] == [14, 9]
    assert policy.lengths[-1] == [16, 11]
    attention = model.model.layers[0].self_attn
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(prompts()["input_ids"]))
    unturned = attention.k_proj(hidden).view(2, 14, 2, 8).transpose(1, 2)
    torch.testing.assert_close(key, unturned)
    last = attention.q_proj(hidden[:, -1:]).view(2, 1, 4, 8).transpose(1, 2)
    torch.testing.assert_close(query, last)


def test_begin_with_padding_on_the_right_and_a_window() -> None:
    model = build("Mistral", sliding_window=6)
    policy = Recorder()
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:] = 0
    with positions(model, policy):
        logits(model, input_ids=prompts()["input_ids"], attention_mask=mask)
    visible = policy.seen[0][3]
    assert visible.nonzero().tolist() == [[0, i] for i in range(8, 14)] + [
        [1, i] for i in range(3, 9)
    ]


def test_ragged_batch_equals_each_request() -> None:
    model = build("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    module = model.model.layers[0].self_attn
    rotary = Rotary.of(model)
    requests = [RequestState(length=30), RequestState(length=8)]
    x = torch.randn(1, 4, 12, 8, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[*range(20, 27), *range(5)]])
    owner = torch.tensor([[0] * 7 + [1] * 5])
    policy = ModelPositions(per_request=True)
    together = policy.rotate(module, x, Tokens(rotary, at, requests, owner))
    for index, part in ((0, slice(0, 7)), (1, slice(7, 12))):
        alone = policy.rotate(module, x[:, :, part], Tokens(rotary, at[:, part], [requests[index]]))
        torch.testing.assert_close(together[:, :, part], alone)
    # Frequencies follow the request's length, not the positions of a chunk.
    early = Tokens(rotary, at[:, 7:], [RequestState(length=30)])
    assert (policy.rotate(module, x[:, :, 7:], early) - together[:, :, 7:]).abs().max() > 0.01


def test_positions_beyond_their_regime_are_refused() -> None:
    model = build("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=16)
    tokens = Tokens(Rotary.of(model), torch.tensor([[20]]), [RequestState(length=8)])
    with pytest.raises(ModelError, match="regime"):
        tokens.rotate(model.model.layers[0].self_attn, torch.zeros(1, 4, 1, 8))


def halved(model: nn.Module, run: Any) -> Positions:
    return Interpolated(2.0)


def test_transform_pickles_and_stays() -> None:
    model, other = build("Llama"), build("Llama")
    transform = pickle.loads(pickle.dumps(positions_transform("positions", halved)))
    assert transform.claims == {"positions"}
    assert transform.apply(model, None) is model
    with positions(other, Interpolated(2.0)):
        torch.testing.assert_close(logits(model), logits(other))
        assert torch.equal(generate(model), generate(other))


def test_policies_satisfy_the_protocol() -> None:
    assert isinstance(ModelPositions(), Positions)
    assert isinstance(Interpolated(1.0), Positions)
    assert not isinstance(partial(halved), Positions)
