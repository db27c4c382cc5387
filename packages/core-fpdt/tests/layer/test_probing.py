"""The probe tells kinds of layers that chunks would change from those that they leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.positions.install import positions
from core.positions.policy import ModelPositions
from core.testing import tiny
from core_fpdt import enable
from core_fpdt.probing import probe


class LooksAhead(nn.Module):
    """A feed-forward part that mixes neighbouring tokens: no chunk can do that alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden + hidden.roll(1, dims=1))


class Noisy(nn.Module):
    """A feed-forward part that draws random numbers without being a dropout."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden + torch.randn_like(hidden))


def test_one_finding_for_every_kind_of_layer() -> None:
    model = tiny.build("Gemma3Text", num_hidden_layers=6, sliding_window=16)
    findings = probe(model)
    assert [finding.reason for finding in findings] == ["", ""]
    assert sum(finding.alike for finding in findings) == 6


@pytest.mark.parametrize(
    ("wrapper", "reason"), [(LooksAhead, "something else"), (Noisy, "random numbers")]
)
def test_a_layer_that_chunks_would_change_is_refused(wrapper: Any, reason: str) -> None:
    model = tiny.llama()
    model.model.layers[1].mlp = wrapper(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=r"layer 1 \(LlamaDecoderLayer\).*" + reason):
        enable(model)
    assert model.config._attn_implementation != "core_fpdt"
    found = {finding.layer: finding.reason for finding in probe(model)}
    assert found[0] == ""
    assert reason in found[1]


def test_dropout_of_attention_is_refused_by_name() -> None:
    model = tiny.llama(attention_dropout=0.1)
    with pytest.raises(ModelError, match="dropout of attention weights"):
        enable(model)


def test_half_precision_is_probed_in_float32() -> None:
    model = tiny.build(
        "Gemma2", head_dim=8, attn_logit_softcapping=2.0, sliding_window=16
    ).bfloat16()
    assert [finding.reason for finding in probe(model)] == ["", ""]


def test_what_is_no_decoder_of_transformers_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be run in chunks"):
        enable(nn.Linear(3, 3))


def test_a_model_is_enabled_once() -> None:
    model = tiny.llama()
    with enable(model), pytest.raises(ModelError, match="runs in chunks already"):
        enable(model)


def test_a_policy_of_positions_is_heeded() -> None:
    model = tiny.llama().double()
    inputs = {**tiny.batch(length=40), "use_cache": False}
    policy = ModelPositions(per_request=True)
    with positions(model, policy):
        wanted = model(**inputs).loss
        (gradient,) = torch.autograd.grad(wanted, [model.model.layers[0].self_attn.k_proj.weight])
        with enable(model, chunk_tokens=13):
            found = model(**inputs).loss
            weight = model.model.layers[0].self_attn.k_proj.weight
            torch.testing.assert_close(torch.autograd.grad(found, [weight])[0], gradient)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("family", "joins"), [("Llama", False), ("GptOss", True)])
def test_models_whose_masks_ignore_packed_documents_are_known(family: str, joins: bool) -> None:
    with enable(tiny.build(family)) as enabled:
        assert enabled.runner.joins_documents is joins
