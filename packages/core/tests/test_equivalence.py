"""The probe of a model refuses what differs, names where, and leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from core.equivalence import (
    counted,
    decoder_layers,
    probe_tokens,
    record,
    require_calls,
    require_equivalent,
)
from core.errors import ModelError
from core.testing.tiny import build as build_family


def build(family: str = "Llama", head: str = "", **changes: Any) -> Any:
    return build_family(family, head, **changes)


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("head", ["ForCausalLM", "Model"])
def test_an_untouched_model_equals_itself(head: str, device: str) -> None:
    model = build(head=head).to(device)
    before = record(model)
    assert [layer.kind for layer in before.layers] == ["LlamaDecoderLayer"] * 3
    assert before.layers[0].output.shape == (2, 24, 32)
    assert not before.real[1, 0]
    assert before.real[0].all()
    require_equivalent(before, record(model), tolerance=0)


def test_the_first_differing_layer_is_named() -> None:
    model = build()
    before = record(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.1
    with pytest.raises(ModelError, match=r"layer 1 \(LlamaDecoderLayer\) differs") as caught:
        require_equivalent(before, record(model))
    assert "LlamaForCausalLM" in str(caught.value)
    assert "tolerance" in str(caught.value)


def test_a_changed_head_is_named() -> None:
    model = build()
    before = record(model)
    with torch.no_grad():
        model.lm_head.weight[0] += 0.1
    with pytest.raises(ModelError, match="the logits differs"):
        require_equivalent(before, record(model))
    require_equivalent(before, record(model), tolerance=2.0)


def test_tolerance_holds_at_every_position() -> None:
    model = build()
    before = record(model)
    loud = before.layers[0].output
    loud[0, 0] *= 1e6  # such tokens occur in trained models, and hide nothing here
    after = record(model)
    after.layers[0].output[0, 0] = loud[0, 0]
    after.layers[0].output[0, 5] += 0.01
    with pytest.raises(ModelError, match="layer 0"):
        require_equivalent(before, after)


def test_padding_is_not_compared() -> None:
    model = build()
    before, after = record(model), record(model)
    after.logits[1, 0] += 9
    require_equivalent(before, after, tolerance=0)
    after.logits[1, -1] += 9
    with pytest.raises(ModelError):
        require_equivalent(before, after)


def test_given_tokens_and_length() -> None:
    model = build()
    tokens = torch.arange(1, 9).view(1, 8)
    trace = record(model, tokens, real=torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]]))
    assert torch.equal(trace.tokens, tokens)
    assert trace.real.sum() == 7
    assert record(model, length=40).tokens.shape == (2, 40)
    with pytest.raises(ValueError, match="different tokens"):
        require_equivalent(trace, record(model))


def test_a_window_is_left() -> None:
    assert record(build("Mistral", sliding_window=40)).tokens.shape == (2, 64)
    assert record(build("Mistral", sliding_window=4096), length=None).tokens.shape == (2, 1024)


def test_nan_is_refused() -> None:
    model = build()
    before, after = record(model), record(model)
    after.layers[2].output[0, 3, 0] = torch.nan
    with pytest.raises(ModelError, match="layer 2"):
        require_equivalent(before, after)
    with pytest.raises(ModelError, match="not finite"):
        require_equivalent(after, after)


def test_modes_random_state_and_gradients_are_left_alone() -> None:
    model = build("GPT2", resid_pdrop=0.5, embd_pdrop=0.5)
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    require_equivalent(record(model), record(model), tolerance=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_when_the_model_fails() -> None:
    model = build().train()
    model.model.layers[1].mlp = nn.Identity()
    model.model.layers[1].forward = None
    with pytest.raises(TypeError):
        record(model)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mixtral", "GPTNeoX", "Bloom", "T5"])
def test_layers_are_found(family: str) -> None:
    # A mixture has lists of experts, T5 has an encoder beside its decoder.
    layers = decoder_layers(build(family))
    assert len(layers) == 3
    assert "Layer" in type(layers[0]).__name__ or "Block" in type(layers[0]).__name__


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (nn.Linear(2, 2), "no list of decoder layers"),
        (nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), "no config"),
    ],
)
def test_other_modules_are_refused(subject: nn.Module, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        record(subject, torch.ones(1, 2, dtype=torch.long))


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1))
    with pytest.raises(ModelError, match="no weights yet"):
        record(model)


def test_calls_are_counted_by_layer() -> None:
    model = build()
    trace = record(model, attention="sdpa")
    assert [layer.calls for layer in trace.layers] == [1, 1, 1]
    assert trace.calls == model.config.num_hidden_layers
    require_calls(trace, "sdpa")
    function = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with counted("sdpa") as callers:
        model(torch.ones(1, 3, dtype=torch.long))
        model(torch.ones(1, 3, dtype=torch.long))
    assert len(callers) == 6
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is function


@pytest.mark.parametrize("family", ["Bloom", "Falcon", "Mpt", "CodeGen", "GPTJ"])
def test_models_that_ignore_the_registry_are_refused_by_name(family: str) -> None:
    model = build(family)
    trace = record(model, attention="sdpa")
    assert trace.calls == 0
    with pytest.raises(ModelError, match=f"{family}ForCausalLM ignores .*sdpa") as caught:
        require_calls(trace, "sdpa")
    assert "layer 0" in str(caught.value)


def test_unknown_functions_cannot_be_counted() -> None:
    with pytest.raises(ModelError, match="nobody"):
        record(build(), attention="nobody")


def test_a_layer_run_in_pieces_is_put_together() -> None:
    model = build()
    before = record(model)
    layer = model.model.layers[1]
    layer.forward = in_pieces(layer.mlp, layer.forward)
    require_equivalent(before, record(model))


def in_pieces(mlp: nn.Module, whole: Callable[..., Tensor]) -> Callable[..., Tensor]:
    plain = mlp.forward

    def split(x: Tensor) -> Tensor:
        return torch.cat([plain(piece) for piece in x.split(7, dim=1)], dim=1)

    mlp.forward = split
    return whole


def test_a_model_run_in_packed_pieces_has_the_same_trace() -> None:
    """Two rows in one, and one token after the other, as far as a row's own tokens go."""
    model = build()
    tokens = probe_tokens(model)

    def row_by_row(ids: Tensor) -> Tensor:
        rows = [model(row.unsqueeze(0), use_cache=False).logits for row in ids]
        return torch.cat(rows)

    before, after = record(model, tokens), record(model, tokens, run=row_by_row)
    require_equivalent(before, after)
    assert after.layers[0].output.shape == before.layers[0].output.shape
