"""Gradients of chunked layers against finite differences, dropout included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from core.errors import ModelError
from core.testing import tiny
from core_fpdt import enable

# Llama and its like compute their norms in float32, which differences are too coarse for.
SMALL = {
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Run = Callable[[torch.Tensor], torch.Tensor]
ORDERS = pytest.mark.parametrize("order", ["query", "key"])


class Afresh(torch.autograd.Function):
    """Runs a model again for every backward pass: gradcheck asks one graph several times."""

    @staticmethod
    def forward(ctx: Any, run: Run, inputs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.run, ctx.weights = run, weights
        ctx.save_for_backward(inputs)
        return run(inputs).detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (inputs,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = inputs.detach().requires_grad_()
            output = ctx.run(leaf)
        return None, *torch.autograd.grad(output, (leaf, *ctx.weights), grad)


@ORDERS
@pytest.mark.parametrize("length", [1, 5])
def test_gradcheck_of_a_chunked_layer(order: str, length: int) -> None:
    model = tiny.build("Phi", **SMALL).double().train()
    layer = model.model.layers[0]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, length, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = (layer.self_attn.k_proj.weight, layer.input_layernorm.weight)

    def run(inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return found

    with enable(model, chunk_tokens=2, strict=False, order=order):
        assert gradcheck(Afresh.apply, (run, hidden, *weights), check_undefined_grad=False)


class Seeded:
    """A number that a model with dropout makes, the same one for a seed.

    Not its loss: transformers computes that in float32.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        self.body, self.ids = model.base_model, ids
        generator = torch.Generator().manual_seed(7)
        self.factors = torch.randn(*ids.shape, 32, generator=generator, dtype=torch.float64)

    def __call__(self, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        output = self.body(self.ids, use_cache=False).last_hidden_state
        return (output * self.factors).sum()


DROPOUT = {
    "Phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.1},
    "GPT2": {"resid_pdrop": 0.3, "attn_pdrop": 0.0, "embd_pdrop": 0.1, "n_embd": 32, "n_layer": 2},
    "OPT": {"dropout": 0.2, "attention_dropout": 0.0, "activation_function": "gelu"},
}


@ORDERS
@pytest.mark.parametrize("keep_keys", [True, False])
@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_is_replayed(family, keep_keys, order, tokens) -> None:
    model = tiny.build(family, **DROPOUT[family]).double()
    settings = {"order": order, "keep_keys": keep_keys, "keep_output": 0.5}
    with enable(model, chunk_tokens=16, strict=False, **settings):
        loss_of = Seeded(model.train(), tokens()["input_ids"])
        first = loss_of(1)
        assert torch.equal(first.detach(), loss_of(1).detach())
        assert not torch.equal(first.detach(), loss_of(2).detach())
        state = torch.get_rng_state()
        first.backward()
        assert torch.equal(torch.get_rng_state(), state), "replaying draws for nobody else"
        require_slope(model.base_model, loss_of)


def require_slope(model: nn.Module, loss_of: Seeded) -> None:
    """The derivative along one random direction of all parameters."""
    generator = torch.Generator().manual_seed(5)
    wanted, step = 0.0, 1e-6
    directions = []
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        directions.append(drawn)
        wanted += float((drawn * parameter.grad).sum())
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, drawn in zip(model.parameters(), directions, strict=True):
                parameter.add_(drawn, alpha=sign * step)
            losses.append(float(loss_of(1)))
    found = (losses[0] - losses[1]) / (2 * step)
    assert found == pytest.approx(wanted, rel=1e-7)


def test_dropout_of_whole_and_chunked_models_has_the_same_share(tokens, trained) -> None:
    """The masks are others, but as many."""
    model = tiny.build("Phi3", resid_pdrop=0.4, num_hidden_layers=1).double()
    shares: list[float] = []

    def watch(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        shares.append(float((output == 0).double().mean()))

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(watch)
    with enable(model, chunk_tokens=16, strict=False):
        torch.manual_seed(0)
        trained(model, tokens())
    assert len(shares) >= 2 * 2 * 4, "forwards and once more backwards, for all chunks"
    assert sum(shares) / len(shares) == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("strict", [True, False])
def test_attention_dropout_is_refused_by_name(strict, tokens, trained) -> None:
    model = tiny.llama(attention_dropout=0.1)
    before = copy.deepcopy(model.state_dict())

    def use() -> None:
        with enable(model, chunk_tokens=16, strict=strict):
            trained(model, tokens())

    with pytest.raises(ModelError, match="dropout"):
        use()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
