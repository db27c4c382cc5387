"""Every module with a matrix is either chosen or left out with a reason."""

import pytest
import torch
from torch import nn

from core.errors import SettingsError
from core_fp6 import FP6Linear, Scheme
from core_fp6.models.selecting import select


def test_linear_modules_of_a_decoder_are_chosen(build):
    model = build("llama")
    selection = select(model)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert set(selection.chosen) == linear
    assert selection.left_out == {
        "model.embed_tokens": "an embedding",
        "lm_head": "the output layer, or tied to it",
    }
    weights = {name for name, _, _ in selection.weights()}
    assert weights == {f"{name}.weight" for name in linear}


def test_experts_are_chosen_and_routers_are_not(build):
    selection = select(build("mixtral"))
    names = [name for name, _, _ in selection.weights() if "experts" in name]
    assert names == [
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in (0, 1)
        for part in ("gate_up_proj", "down_proj")
    ]
    assert selection.left_out["model.layers.1.mlp.gate"] == "no linear layer: MixtralTopKRouter"


def test_the_same_is_chosen_without_values(build, names):
    for family in names:
        with torch.device("meta"):
            empty = build(family)
        assert select(empty).chosen.keys() == select(build(family)).chosen.keys()


def test_what_the_class_keeps_in_float32_is_left_out(build):
    model = build("llama")
    model._keep_in_fp32_modules = {"down_proj"}
    selection = select(model)
    assert selection.left_out["model.layers.0.mlp.down_proj"] == "the model keeps it in float32"


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("model.layers.1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),
        (r"model\.layers\.0\.mlp\.(up|gate)_proj", ["gate_proj", "up_proj"]),
    ],
)
def test_skip_takes_names_ends_and_regular_expressions(build, pattern, left_out):
    found = [
        name
        for name, reason in select(build("llama"), [pattern]).left_out.items()
        if reason == "skipped on request"
    ]
    assert [name for name in found if not name.endswith(tuple(left_out))] == []
    assert len(found) == len(left_out)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("q_prj", r"skip has 'q_prj': no module .*\n.*did you mean 'q_proj'"),
        ("layers.7", "no module of the model matches it"),
        ("(", "it is no pattern"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(build, pattern, message):
    with pytest.raises(SettingsError, match=message):
        select(build("llama"), [pattern])


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight


def test_states_that_would_be_lost_are_left_out():
    model = Shared()
    selection = select(model)
    assert list(selection.chosen) == ["three"]
    assert selection.left_out["one"] == "a weight shared by one and two"
    model.three.register_forward_hook(lambda *_: None)
    assert select(model).left_out["three"] == "hooks on it, which would be lost"


def test_other_kinds_of_linear_layers_are_left_out():
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict(
        {
            "attention": attention,
            "wide": nn.Linear(4, 4, dtype=torch.float64),
            "six": FP6Linear.from_linear(nn.Linear(4, 4), Scheme()),
            "convolution": nn.Conv2d(3, 3, 3),
            "mlp": nn.ModuleDict({"gate": nn.Linear(4, 2), "up": nn.Linear(4, 4)}),
        }
    )
    selection = select(model)
    assert list(selection.chosen) == ["mlp.up"]
    assert selection.left_out == {
        "attention": "no linear layer: MultiheadAttention",
        "attention.out_proj": "no linear layer: NonDynamicallyQuantizableLinear",
        "wide": "a weight in torch.float64",
        "six": "already quantized",
        "convolution": "no linear layer: Conv2d",
        "mlp.gate": "a router",
    }


def test_a_lone_module_cannot_be_exchanged():
    assert select(nn.Linear(4, 4)).left_out == {
        "": "the model itself, which cannot be exchanged in place"
    }
