"""A comparison measures what it says, and leaves the model as it was."""

from __future__ import annotations

import json

import pytest
import torch

from core.errors import DataError, ModelError, SettingsError
from core.testing import tiny
from core_fp6 import Scheme, quantize
from core_fp6.models.selecting import select
from core_fp6.quality.calibration import calibrate
from core_fp6.quality.comparing import compare, plot, variant
from core_fp6.weights.numbers import E2M3, E3M2


def ids(count: int = 3, length: int = 16) -> torch.Tensor:
    return torch.randint(1, 60, (count, length), generator=torch.Generator().manual_seed(0))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_divergence_is_that_of_the_quantized_model(family):
    model, other = (tiny.build(family) for _ in range(2))
    before = state(model)
    found = compare(model, ids(), variants=["e2m3-g32"], batch_size=2)
    quantize(other, group_size=32)
    with torch.no_grad():
        p, q = (m(input_ids=ids()).logits.double().log_softmax(-1) for m in (model, other))
    (score,) = found.scores
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert score.kl == pytest.approx(float(kl), rel=1e-2)
    likelihood = -q[:, :-1].gather(-1, ids()[:, 1:, None]).mean()
    assert score.perplexity == pytest.approx(float(likelihood.exp()), rel=1e-4)
    assert found.unquantized.kl == 0
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_sizes_count_scales():
    model = tiny.build("Llama")
    found = compare(model, ids(), variants=["e2m3-g32", "e3m2-row"])
    for score, scheme in zip(found.scores, (Scheme(E2M3, 32), Scheme(E3M2, 0)), strict=True):
        bits = [
            w.numel() * scheme.bits_per_weight(w.shape[1]) for _, _, w in select(model).weights()
        ]
        assert score.bits_per_weight == pytest.approx(sum(bits) / found.weights)
        assert score.bytes == round(sum(bits) / 8)


def test_the_model_is_as_it_was_after_a_failure():
    model = tiny.build("Llama").train()
    before = state(model)
    calls = []

    def fail(module, args, output):
        calls.append(module)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(model, ids(2), variants=["e3m2-row"])
    assert model.training
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_cannot_be_measured_is_said(monkeypatch):
    monkeypatch.setattr("core_fp6.quality.comparing.variants.find_spec", lambda name: None)
    names = ["e3m2-row", "e2m3-g128-calibrated", "nf4-g64", "int8-row"]
    found = compare(tiny.build("Llama"), ids(), variants=names)
    assert [score.variant for score in found.scores] == ["e3m2-row"]
    assert found.skipped == {
        "e2m3-g128-calibrated": "needs text to calibrate with",
        "nf4-g64": "needs bitsandbytes: pip install bitsandbytes",
        "int8-row": "needs torchao: pip install torchao",
    }
    _, rows = found.table()
    assert [row[0] for row in rows] == ["unquantized", *names[:1], *names[1:]]


def test_results_are_printed_drawn_and_written(tmp_path, capsys):
    model = tiny.build("Llama")
    names = ["e2m3-g128", "e2m3-g128-calibrated", "e3m2-row", "fp8-e4m3-row"]
    found = compare(model, ids(), variants=names, calibration=calibrate(model, ids()))
    found.print()
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert json.loads(json.dumps(found.as_dict()))["calibration_tokens"] == ids().numel()
    assert plot(found, tmp_path / "plots" / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["e9m9-row", "fp6", "int9-row", "e2m3-g7", "nf4", ""])
def test_unknown_ways_are_refused(name):
    with pytest.raises(SettingsError):
        variant(name)


def test_nothing_to_compare_is_refused():
    model = tiny.build("Llama")
    with pytest.raises(DataError, match="two tokens or more"):
        compare(model, ids(2, 1), variants=["e3m2-row"])
    with pytest.raises(ModelError, match="nothing to compare"):
        compare(model, ids(), variants=["e3m2-row"], skip=["model"])
    torch.nn.init.constant_(model.model.layers[0].mlp.up_proj.weight, torch.nan)
    with pytest.raises(ModelError, match=r"up_proj\.weight cannot be quantized"):
        compare(model, ids(), variants=["e3m2-row"])
