"""What training loops do with graphs: accumulate, branch, freeze, hook, fail, go back twice."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest
import torch

from core.errors import ModelError
from core.testing import tiny
from core_fpdt import enable

CHUNK = 16
ORDERS = pytest.mark.parametrize("order", ["query", "key"])


@ORDERS
def test_gradients_accumulate(order, tokens, trained, distance) -> None:
    model = tiny.llama().double()
    batches = [tokens(seed=0), tokens(seed=1, length=29)]
    parts = [trained(copy.deepcopy(model), batch) for batch in batches]
    model.train()
    with enable(model, chunk_tokens=CHUNK, strict=False, order=order):
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert distance(found, {n: parts[0][n] + parts[1][n] for n in found}) < 1e-11


@ORDERS
@pytest.mark.parametrize("offload", ["none", "host", "file"])
def test_two_forward_passes_before_one_backward_pass(order, offload, tokens, distance) -> None:
    """Preference losses have a chosen and a rejected answer in one graph."""
    model = tiny.llama().double().train()

    def preference(model) -> torch.Tensor:
        chosen, rejected = (
            model(**tokens(seed=seed, length=length), use_cache=False).loss
            for seed, length in ((0, 53), (1, 40))
        )
        return -torch.nn.functional.logsigmoid(rejected - chosen)

    plain = copy.deepcopy(model)
    preference(plain).backward()
    wanted = {n: p.grad for n, p in plain.named_parameters()}
    with enable(model, chunk_tokens=CHUNK, strict=False, order=order, offload=offload) as enabled:
        preference(model).backward()
        found = {n: p.grad for n, p in model.named_parameters()}
        assert distance(found, wanted) < 1e-11
        assert enabled.runner.store.used() == 0


def test_graphs_can_be_left_and_gone_back_in_any_order(tokens, distance) -> None:
    model = tiny.llama().double().train()
    with enable(model, chunk_tokens=CHUNK, strict=False):
        first = model(**tokens(seed=0), use_cache=False).loss
        model(**tokens(seed=1), use_cache=False)
        last = model(**tokens(seed=2), use_cache=False).loss
        with torch.no_grad():
            model(**tokens(seed=3), use_cache=False)
        last.backward()
        first.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        for seed in (0, 2):
            model(**tokens(seed=seed), use_cache=False).loss.backward()
        assert distance(found, {n: p.grad for n, p in model.named_parameters()}) < 1e-12


@pytest.mark.parametrize("retain", [True, False])
def test_a_second_backward_pass_is_refused(retain, tokens) -> None:
    model = tiny.llama().train()
    with enable(model, chunk_tokens=CHUNK, strict=False):
        loss = model(**tokens(), use_cache=False).loss
        loss.backward(retain_graph=retain)
        kind, what = (ModelError, "second backward") if retain else (RuntimeError, "second time")
        with pytest.raises(kind, match=what):
            loss.backward()
        model.zero_grad()
        model(**tokens(), use_cache=False).loss.backward()


@pytest.mark.parametrize("head", [True, False])
def test_second_derivatives_are_refused(head, tokens) -> None:
    model = tiny.llama().double().train()
    weight = model.model.layers[0].mlp.up_proj.weight

    def twice() -> None:
        batch = tokens()
        if head:
            loss = model(**batch, use_cache=False).loss
        else:
            loss = model.model(batch["input_ids"], use_cache=False).last_hidden_state.sum()
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        first.square().sum().backward()

    with (
        enable(model, chunk_tokens=CHUNK, strict=False),
        pytest.raises((ModelError, RuntimeError), match=r"gradients of gradients|once_differen"),
    ):
        twice()


@pytest.mark.parametrize("trainable", ["q_proj", "down_proj", "norm", "embed_tokens", "layers.1."])
@ORDERS
def test_partially_frozen_models(trainable, order, tokens, trained, distance) -> None:
    model = tiny.llama().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    wanted = trained(copy.deepcopy(model), tokens())
    assert len(wanted) > 1
    with enable(model, chunk_tokens=CHUNK, strict=False, order=order):
        assert distance(trained(model, tokens()), wanted) < 1e-11


def test_only_embeddings_given_by_the_caller_get_a_gradient(tokens) -> None:
    """Soft prompts: no parameter of a layer is trained."""
    model = tiny.llama().double().train().requires_grad_(False)
    batch = tokens()
    inputs = model.get_input_embeddings()(batch["input_ids"])
    found = []
    for chunked in (False, True):
        given = inputs.clone().requires_grad_()
        enabled = enable(model, chunk_tokens=CHUNK, strict=False) if chunked else None
        model(inputs_embeds=given, labels=batch["labels"], use_cache=False).loss.backward()
        found.append(given.grad)
        if enabled is not None:
            enabled.disable()
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@ORDERS
def test_hooks_of_parameters_fire_once(order, tokens, trained, distance) -> None:
    """A hook per chunk breaks DDP and FSDP, which reduce in it, and changes gradients twice."""
    model = tiny.llama().double()
    wanted = trained(copy.deepcopy(model), tokens())
    before, after = Counter(), Counter()

    def halved(gradient: torch.Tensor, name: str) -> torch.Tensor:
        before.update([name])
        return gradient / 2

    for name, parameter in model.named_parameters():
        parameter.register_hook(partial(halved, name=name))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: after.update([name]))
    settings = {"order": order, "mlp_chunks": 3, "loss_chunk_bytes": 4096}
    with enable(model, chunk_tokens=CHUNK, strict=False, **settings):
        found = trained(model, tokens())
    names = {name for name, _ in model.named_parameters()}
    assert after == Counter(names)
    assert before == Counter(names)
    halves = {n: g if n == "loss" else g / 2 for n, g in wanted.items()}
    # Losses are added up in float32, and in another order than without chunks.
    assert distance(found, halves) < 1e-6


def test_gradients_can_be_asked_for_without_accumulating(tokens, trained, distance) -> None:
    """``torch.autograd.grad`` on the weights of tiled layers."""
    model = tiny.llama().double().train()
    wanted = trained(copy.deepcopy(model), tokens())
    names, parameters = zip(*model.named_parameters(), strict=True)
    with enable(model, chunk_tokens=CHUNK, strict=False, mlp_chunks=3):
        loss = model(**tokens(), use_cache=False).loss
        found = torch.autograd.grad(loss, parameters)
    assert all(parameter.grad is None for parameter in parameters)
    del wanted["loss"]
    assert distance(dict(zip(names, found, strict=True)), wanted) < 1e-11


def test_inputs_of_layers_are_left_alone(tokens, distance, trained) -> None:
    """Gradients written into what was saved change what others still need."""
    model = tiny.llama().double().train()
    wanted = trained(copy.deepcopy(model), tokens())
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(_, args, kwargs) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        kept.append((hidden, hidden.detach().clone()))

    for layer in model.model.layers:
        layer.register_forward_pre_hook(keep, with_kwargs=True)
        layer.mlp.register_forward_pre_hook(keep, with_kwargs=True)
    with enable(model, chunk_tokens=CHUNK, strict=False, mlp_chunks=2):
        found = trained(model, tokens())
    assert len(kept) > 6
    assert all(torch.equal(now.detach(), before) for now, before in kept)
    assert distance(found, wanted) < 1e-11


@ORDERS
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_of_a_chunk_leaves_nothing_behind(
    error, backward, order, tokens, trained, distance
) -> None:
    model = tiny.llama().double()
    wanted = trained(copy.deepcopy(model), tokens())
    calls = [0]

    def fail(*_) -> None:
        calls[0] += 1
        # Four chunks of three layers go forwards first.
        if calls[0] == (3 * 4 + 6 if backward else 6):
            raise error("as it happens")

    settings = {"offload": "host", "order": order}
    with enable(model, chunk_tokens=CHUNK, strict=False, **settings) as enabled:
        hooks = [x.mlp.register_forward_pre_hook(fail) for x in model.model.layers]
        with pytest.raises(error, match="as it happens"):
            trained(model, tokens())
        for hook in hooks:
            hook.remove()
        model.zero_grad()
        assert enabled.runner.store.used() == 0
        assert distance(trained(model, tokens()), wanted) < 1e-11
