"""Chunks whose scores are hundreds apart, rows that see nothing, logits of ten thousand."""

from __future__ import annotations

import copy

import pytest
import torch

from core.softmax import Partial
from core.testing import tiny
from core_fpdt import enable
from core_fpdt.layer import rows

ORDERS = pytest.mark.parametrize("order", ["query", "key"])
CHUNK = 8


def sharpened(factor: float, family: str = "Llama"):
    """A model whose scores are ``factor`` times larger than those of tiny ones."""
    model = tiny.build(family, num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(factor)
    return model


@pytest.fixture
def gaps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Largest differences of lse between what was attended before and a block that is merged."""
    found: list[float] = []
    plain = rows.accumulate

    def watched(kernel, running, query, key, value, tile, scores) -> Partial:
        if running is not None:
            part = kernel.forward(query, key, value, tile, scores)
            gap = (part.lse - running.lse).abs()
            found.append(float(gap[gap.isfinite()].max()))
        return plain(kernel, running, query, key, value, tile, scores)

    monkeypatch.setattr(rows, "accumulate", watched)
    return found


@ORDERS
@pytest.mark.parametrize("factor", [30.0, 3000.0])
def test_chunks_whose_scores_are_hundreds_apart(
    factor, order, gaps, tokens, trained, distance
) -> None:
    """``exp`` of a difference of 89 is no float32: peers' merge gives 0 and infinity then."""
    model = sharpened(factor).double()
    wanted = trained(copy.deepcopy(model), tokens())
    with enable(model, chunk_tokens=CHUNK, strict=False, order=order):
        assert distance(trained(model, tokens()), wanted) < 1e-8
    assert max(gaps) > 88
    assert max(gaps) > 2 * factor


def test_hundreds_apart_in_float32(gaps, tokens, trained, distance) -> None:
    """Not further from float64 than the model itself is."""
    model = sharpened(30.0)
    exact = trained(copy.deepcopy(model).double(), tokens())
    own = distance(trained(copy.deepcopy(model), tokens()), exact)
    with enable(model, chunk_tokens=CHUNK, strict=False):
        assert distance(trained(model, tokens()), exact) < 2 * own + 1e-6
    assert max(gaps) > 88


@ORDERS
def test_whole_chunks_of_padding(order, tokens, trained, distance) -> None:
    model = tiny.llama().double()
    batch = tokens()
    padding = 3 * CHUNK + 2
    real = torch.ones_like(batch["input_ids"])
    real[1, :padding] = 0
    batch["attention_mask"] = real
    batch["labels"][1, : padding + 1] = -100
    wanted = trained(copy.deepcopy(model), batch)
    with enable(model, chunk_tokens=CHUNK, strict=False, order=order):
        assert distance(trained(model, batch), wanted) < 1e-11


@ORDERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_row_of_nothing_but_padding_changes_nothing(
    order, dtype, tokens, trained, distance
) -> None:
    model = tiny.llama().to(dtype)
    alone = tokens(rows=1)
    batch = {name: tensor.repeat(2, 1) for name, tensor in alone.items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1] = 0
    batch["labels"][1] = -100
    with enable(model, chunk_tokens=CHUNK, strict=False, order=order):
        wanted = trained(model, alone)
        assert distance(trained(model, batch), wanted) < (1e-12 if dtype == torch.float64 else 1e-5)


# What Gemma 2 does without chunks is a softmax in float32.
@pytest.mark.parametrize(("family", "tolerance"), [("Llama", 1e-7), ("Gemma2", 1e-5)])
def test_hidden_states_of_ten_thousand(family, tolerance, tokens, trained, distance) -> None:
    changes = {"head_dim": 8} if family == "Gemma2" else {}
    model = tiny.build(family, num_hidden_layers=2, **changes).double()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e4)
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(1e3)
    wanted = trained(copy.deepcopy(model), tokens())
    with enable(model, chunk_tokens=CHUNK, strict=False):
        assert distance(trained(model, tokens()), wanted) < tolerance


def test_losses_of_hundreds_are_finite(tokens, trained, distance) -> None:
    """The logarithm of a softmax is minus infinity where log_softmax gives minus 200."""
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    batch = tokens()
    batch["labels"][:, 5:20] = -100
    exact = trained(copy.deepcopy(model).double(), batch)
    assert float(exact["loss"]) > 200
    with enable(model, chunk_tokens=CHUNK, strict=False, loss_chunk_bytes=4096):
        assert distance(trained(model, batch), exact) < 1e-4


def test_ignored_labels_get_no_gradient(tokens) -> None:
    model = tiny.llama().double()
    batch = tokens(rows=1)
    batch["labels"][:, 30:] = -100
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    with enable(model, chunk_tokens=CHUNK, strict=False):
        model.train()
        model(inputs_embeds=embeddings, labels=batch["labels"], use_cache=False).loss.backward()
    # What comes after the last label that counts has no part in the loss.
    assert (embeddings.grad[:, 30:] == 0).all()
    assert (embeddings.grad[:, :29].abs().amax(-1) > 0).all()
