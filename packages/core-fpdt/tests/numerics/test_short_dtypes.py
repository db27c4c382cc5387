"""bfloat16, autocast and loss scaling: chunks err hardly more than the model does by itself."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

from core.testing import tiny
from core_fpdt import enable

LENGTH, CHUNK = 320, 64
AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)


def errors(
    model: nn.Module, exact: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Relative errors of groups of gradients: of attention, of everything else, and of the loss."""
    groups: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name, tensor in exact.items():
        kind = "attention" if "self_attn" in name else "loss" if name == "loss" else "rest"
        groups.setdefault(kind, []).append((found[name].double(), tensor))
    made = {}
    for kind, pairs in groups.items():
        off = sum(float((x - y).square().sum()) for x, y in pairs)
        made[kind] = (off / sum(float(y.square().sum()) for _, y in pairs)) ** 0.5
    return made


@pytest.mark.parametrize("order", ["query", "key"])
@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_errors_are_those_of_the_model(order, way, tokens, trained) -> None:
    plain = tiny.llama(hidden_size=64, num_attention_heads=4, max_position_embeddings=LENGTH)
    with torch.no_grad():
        for parameter in plain.parameters():
            # Otherwise nothing is left of the signal after three layers in bfloat16.
            parameter.copy_((parameter * 0.3 if parameter.dim() > 1 else parameter).bfloat16())
    batch = tokens(length=LENGTH)
    exact = trained(copy.deepcopy(plain).double(), batch)
    context: AbstractContextManager[object] = AUTOCAST if way == "autocast" else nullcontext()
    model = plain if way == "autocast" else plain.bfloat16()
    with context:
        own = errors(model, exact, trained(copy.deepcopy(model), batch))
        with enable(model, chunk_tokens=CHUNK, strict=False, order=order):
            found = trained(model, batch)
    assert {found[name].dtype for name, _ in model.named_parameters()} == {
        next(model.parameters()).dtype
    }
    chunked = errors(model, exact, found)
    assert 1e-4 < own["attention"] < 0.1, "there is something to compare"
    for kind in ("attention", "rest"):
        assert chunked[kind] < 1.3 * own[kind], (kind, chunked, own)


def test_autocast_may_end_before_the_backward_pass(tokens, trained, distance) -> None:
    model = tiny.llama()
    batch = tokens()
    with enable(model, chunk_tokens=16, strict=False):
        model.train()
        found = []
        for inside in (True, False):
            model.zero_grad()
            with AUTOCAST:
                loss = model(**batch, use_cache=False).loss
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert distance(found[0], found[1]) == 0


@pytest.mark.parametrize("scale", [2.0**-10, 4.0, 2.0**16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_are_scaled_exactly(scale, dtype, tokens, trained, distance) -> None:
    """A power of two multiplies every gradient and changes no digit of it."""
    model = tiny.llama().to(dtype)
    with enable(model, chunk_tokens=16, strict=False, loss_chunk_bytes=4096):
        wanted = trained(model, tokens())
        found = trained(model, tokens(), scale=scale)
    for name, _ in model.named_parameters():
        assert torch.equal(found[name], wanted[name] * scale), name


@pytest.mark.parametrize(
    "settings", [{"order": "query"}, {"order": "key", "keep_output": 0.0, "keep_keys": False}]
)
def test_accumulators_of_float64_models_are_float64(settings, tokens, trained, distance) -> None:
    model = tiny.llama(num_hidden_layers=1).double()
    wanted = trained(copy.deepcopy(model), tokens(length=90))
    with enable(model, chunk_tokens=2, strict=False, **settings):
        assert distance(trained(model, tokens(length=90)), wanted) < 1e-12
