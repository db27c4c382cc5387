"""Statistics of inputs are those that the weights really see, and nothing is left on the model."""

from __future__ import annotations

import pytest
import torch

from core.errors import DataError, ModelError
from core.testing import tiny
from core_fp6 import quantize
from core_fp6.quality.calibration import calibrate, tokenize


def ids(count: int = 4, length: int = 24) -> torch.Tensor:
    return torch.randint(1, 60, (count, length), generator=torch.Generator().manual_seed(0))


def test_means_are_those_of_the_inputs():
    model = tiny.build("Llama").train()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            seen[name] = []
            keep = seen[name].append
            module.register_forward_hook(
                lambda m, x, y, keep=keep: keep(x[0].detach()), prepend=True
            )
    found = calibrate(model, ids(), batch_size=3)
    assert model.training
    assert found.tokens == ids().numel()
    # Modules with hooks are left alone: measured again without them.
    assert not found.means
    for module in model.modules():
        module._forward_hooks.clear()
    found = calibrate(model, ids(), batch_size=3)
    assert set(found.means) == {f"{name}.weight" for name in seen}
    for name, inputs in seen.items():
        x = torch.cat([each.flatten(0, -2) for each in inputs]).double()
        torch.testing.assert_close(found.weights(f"{name}.weight"), x.square().mean(0).float())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert found.weights("lm_head.weight") is None
    assert not found.unseen


def test_experts_are_told_apart():
    model = tiny.build("Mixtral", num_local_experts=4, num_experts_per_tok=1)
    single = torch.full((1, 2), 7)
    found = calibrate(model, single)
    for name, mean in found.means.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            assert mean.shape[0] == 4
            unseen = found.unseen[name]
            assert unseen
            assert bool((mean[unseen] == 1).all())
    many = calibrate(model, ids(8, 64))
    assert sum(map(len, many.unseen.values())) < sum(map(len, found.unseen.values()))
    report = quantize(model, group_size=32, calibration=found)
    assert report.unseen == found.unseen


def test_hooks_go_when_the_model_fails():
    model = tiny.build("Llama")
    with pytest.raises(IndexError):
        calibrate(model, torch.full((1, 4), 10**6))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_that_are_not_finite_are_refused_by_name():
    model = tiny.build("Llama")
    torch.nn.init.constant_(model.get_input_embeddings().weight, torch.inf)
    with pytest.raises(ModelError, match=r"q_proj\.weight cannot be calibrated"):
        calibrate(model, ids())


class Letters:
    """A tokenizer as far as it is asked: one token per letter."""

    eos_token_id = 0

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_documents_fill_sequences():
    found = tokenize(Letters(), ["abc", "de"], length=3)
    assert found.tolist() == [[97, 98, 99], [0, 100, 101]]
    assert tokenize(Letters(), ["abcdefgh"] * 4, length=4, limit=2).shape == (2, 4)
    with pytest.raises(DataError, match="3 tokens"):
        tokenize(Letters(), ["ab"], length=4)
