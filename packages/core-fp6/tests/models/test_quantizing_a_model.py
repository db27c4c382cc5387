"""A model in memory is quantized as a whole or not at all, and comes back."""

import json

import pytest
import torch
from torch import nn

from core.errors import ModelError, SettingsError
from core_fp6 import FP6Experts, FP6Linear, Scheme, dequantize, describe, quantize
from core_fp6.quality.calibration import calibrate


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, kept: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == kept.keys() and all(
        torch.equal(now[name].nan_to_num(7), kept[name].nan_to_num(7)) for name in kept
    )


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_codes_are_those_of_the_scheme(build, family):
    model = build(family)
    kept = state(model)
    report = quantize(model, "e3m2", 0)
    scheme = Scheme(report.scheme.format, 0)
    for name, count in report.quantized.items():
        module = model.get_submodule(name)
        total = 0
        for part in module.columns:
            weight = kept[f"{name}.{part}"]
            assert torch.equal(module.dequantized(part), scheme.decode(*scheme.encode(weight)))
            total += weight.numel()
        assert count == total
    assert {type(module) for _, module in model.named_modules()} >= {
        FP6Linear,
        *([FP6Experts] if family == "mixtral" else []),
    }


def test_the_report_counts_what_lies_on_disk(build):
    model = build("mixtral")
    parameters, before = model.num_parameters(), sum(p.nbytes for p in model.parameters())
    report = quantize(model, group_size=32)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (report.parameters, report.bytes_before, report.bytes_after) == (
        parameters,
        before,
        stored,
    )
    assert report.bits_per_weight == pytest.approx(6.5)
    assert report.coverage == pytest.approx(sum(report.quantized.values()) / parameters)
    assert 0.95 < report.coverage < 1
    assert "model.layers.*.mlp.gate (2): no linear layer" in str(report)
    assert json.loads(json.dumps(report.json()))["left_out"] == report.left_out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight"),
        ("mixtral", "model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_a_weight_that_codes_cannot_say_is_named_and_nothing_is_changed(build, family, name, value):
    model = build(family)
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight.view(-1)[[3, 70]] = value
    kept = state(model)
    with pytest.raises(ModelError, match=f"{name} cannot be quantized: 2 of its {weight.numel()}"):
        quantize(model)
    assert same(model, kept)
    assert not hasattr(model, "hf_quantizer")
    assert quantize(
        model, skip=[name.removesuffix(".weight").rpartition(".experts")[0] or name[:-7]]
    )


def test_a_failure_half_way_changes_nothing(build):
    model = build("llama")
    kept, seen = state(model), []

    def scales(name, weight, scheme):
        seen.append(name)
        if len(seen) == 9:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        quantize(model, scales=scales)
    assert same(model, kept)
    assert quantize(model).quantized


def test_a_module_in_two_places_is_exchanged_in_both():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": nn.Sequential(layer), "two": nn.Sequential(layer)})
    quantize(model)
    assert isinstance(model["one"][0], FP6Linear)
    assert model["one"][0] is model["two"][0]


def test_scales_can_come_from_elsewhere():
    layer = nn.Linear(64, 4)
    twice = 2 * Scheme(group_size=32).scales(layer.weight.detach())
    for scales in ({"0.weight": twice}, lambda *_: twice):
        model = nn.Sequential(layer, nn.Linear(64, 4))
        quantize(model, group_size=32, scales=scales)
        assert torch.equal(model[0].weight_scale, twice)
    with pytest.raises(ModelError, match=r"scales given for 0.weight are none: .*\[4, 2\]"):
        quantize(nn.Sequential(layer), group_size=32, scales={"0.weight": twice[:, :1]})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "e2m2"}, SettingsError, "weights are not packed as e2m2"),
        ({"format": "fp6"}, SettingsError, "no format 'fp6'"),
        ({"group_size": 48}, SettingsError, "no group size 48"),
        ({"skip": ["q_prj"]}, SettingsError, "did you mean 'q_proj'"),
        ({"skip": ["model", "lm_head"]}, ModelError, "nothing to quantize"),
    ],
)
def test_wrong_arguments_change_nothing(build, arguments, error, message):
    model = build("llama")
    kept = state(model)
    with pytest.raises(error, match=message):
        quantize(model, **arguments)
    assert same(model, kept)


def test_a_model_is_quantized_once(build):
    model = build("llama")
    quantize(model)
    with pytest.raises(ModelError, match="quantized already"):
        quantize(model)


def test_a_model_without_values_is_refused(build):
    with torch.device("meta"):
        model = build("llama")
    with pytest.raises(ModelError, match="on the meta device"):
        quantize(model)


def test_other_quantized_layers_are_left_alone():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    four = bitsandbytes.nn.Linear4bit(64, 64)
    model = nn.Sequential(four, nn.Linear(64, 64))
    report = quantize(model)
    assert model[0] is four
    assert report.left_out == {"0": "no linear layer: Linear4bit"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral"])
def test_dequantizing_gives_the_classes_of_the_model_back(build, family, ids):
    model, plain = build(family), build(family)
    quantize(model, group_size=64)
    with torch.no_grad():
        expected = model(ids).logits
    dequantize(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [(n, p.shape, p.dtype) for n, p in model.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in plain.named_parameters()
    ]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6)
    with pytest.raises(ModelError, match="no six-bit weights"):
        dequantize(model)
    assert getattr(model.config, "quantization_config", None) is None


def test_transformers_own_dequantize_does_the_same(build):
    model = build("llama")
    quantize(model)
    model.dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_quantized_model_can_be_described_later(build, family):
    model = build(family)
    report = quantize(model, group_size=32, skip=["k_proj"])
    again = describe(model)
    assert again.json() | {"left_out": {}} == report.json() | {"left_out": {}}
    assert again.left_out.keys() == report.left_out.keys()
    assert again.left_out["model.layers.0.self_attn.k_proj"] == "not quantized"


def test_searched_scales_come_from_calibration(build, ids):
    model, plain = build("mixtral"), build("mixtral")
    calibration = calibrate(model, ids)
    with torch.no_grad():
        exact = model(ids).logits
        report = quantize(model, calibration=calibration)
        quantize(plain)
        ours, theirs = ((m(ids).logits - exact).square().mean() for m in (model, plain))
    assert ours < theirs
    assert report.unseen == calibration.unseen
