"""Lazy logits are a tensor to everybody: what is read, changed, hooked or saved is what it would be."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from core.errors import ModelError
from core_fpdt.loss.logits import LazyLogits


@pytest.fixture
def pair(build: Any, lazy: Any, batch: Any) -> Any:
    """A function that makes plain and lazy logits of the same model, with gradients."""

    def pair(**changes: Any) -> tuple[nn.Module, Tensor, LazyLogits]:
        model = build(**changes)
        plain = model(batch["input_ids"]).logits
        lazy(model)
        return model, plain, model(batch["input_ids"]).logits

    return pair


def computed(logits: Tensor) -> bool:
    return "not computed" not in repr(logits)


def test_questions_compute_nothing(pair: Any) -> None:
    _, plain, lazy = pair()
    assert isinstance(lazy, Tensor)
    assert lazy.shape == lazy.size() == plain.shape
    assert (lazy.dtype, lazy.device, lazy.ndim, len(lazy)) == (plain.dtype, plain.device, 3, 2)
    assert lazy.numel() == plain.numel()
    assert lazy.stride() == plain.stride()
    assert lazy.requires_grad
    assert lazy.grad_fn is not None
    assert lazy.is_floating_point()
    assert not lazy.detach().requires_grad
    assert not computed(lazy)


READS: dict[str, Any] = {
    "whole": lambda x: x.clone() + 0 * x,
    "argmax": lambda x: x.argmax(-1),
    "function": lambda x: torch.softmax(x, -1),
    "item": lambda x: torch.tensor(x[1, 2, 3].item()),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "list": lambda x: torch.tensor(x.tolist()),
    "cat": lambda x: torch.cat([x, x[:, :3]], dim=1),
    "both sides": lambda x: x * x.float(),
    "right side": lambda x: torch.ones(96) @ x.transpose(1, 2),
    "one class": lambda x: x[..., 3],
    "new dimension": lambda x: x[..., None, :3],
    "lists": lambda x: x[[1, 0], [3, 4]],
    "squares": lambda x: x.reshape(2, 24, 8, 12),
    "to int": lambda x: (x * 100).to(torch.int64),
    "property": lambda x: x.mT,
    "unbind": lambda x: x.unbind(1)[5],
    "per token": lambda x: x * torch.linspace(0, 1, 24)[:, None],
    "rounded": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "in half": lambda x: x.bfloat16().float(),
}


@pytest.mark.parametrize("case", READS)
def test_reading_gives_the_numbers(case: str, pair: Any) -> None:
    _, plain, lazy = pair()
    result = READS[case](lazy)
    wanted = READS[case](plain)
    assert result.dtype == wanted.dtype
    assert torch.equal(result, wanted)


def test_a_few_rows_are_computed_alone(pair: Any) -> None:
    _, plain, lazy = pair()
    assert torch.equal(lazy[:, -1].argmax(-1), plain[:, -1].argmax(-1))
    assert not computed(lazy)


def test_gradients_go_through_what_is_read(pair: Any) -> None:
    model, plain, lazy = pair(family="Gemma2")
    parameters = [p for p in model.parameters() if p.requires_grad]

    def score(logits: Tensor) -> Tensor:
        return logits.softmax(-1).square().sum() + logits[:, 3].sum()

    wanted = torch.autograd.grad(score(plain), parameters)
    for ours, theirs in zip(torch.autograd.grad(score(lazy), parameters), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


class Doubled(torch.autograd.Function):
    """Reads its input where Python is not asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.aten.mul.Tensor(x, 2.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


@pytest.mark.parametrize("family", ["Phi", "Gemma2"])
def test_gradients_go_through_the_functions_of_others(pair: Any, family: str) -> None:
    model, plain, lazy = pair(family=family)
    parameters = list(model.parameters())
    weights = torch.linspace(-1, 1, 96)
    wanted = torch.autograd.grad((Doubled.apply(plain) * weights).sum(), parameters)
    found = torch.autograd.grad((Doubled.apply(lazy) * weights).sum(), parameters)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


CHANGES: dict[str, Any] = {
    "times": lambda x: x.mul_(2),
    "operator": lambda x: x.__itruediv__(3),
    "classes": lambda x: x.__setitem__((..., slice(3, 9)), -1e4),
    "rows": lambda x: x.__setitem__((0, slice(2, 5)), 1.0),
    "of a view": lambda x: x[:, 3:6].zero_(),
    "of a view of a view": lambda x: x.view(-1, 96)[5:7].fill_(2.0),
    "twice": lambda x: (x.add_(1), x[1].mul_(2)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_in_place(case: str, pair: Any, batch: Any) -> None:
    _, plain, lazy = pair()
    view, wanted_view = lazy[..., 1:, :], plain[..., 1:, :]
    CHANGES[case](lazy)
    CHANGES[case](plain)
    assert torch.equal(lazy, plain)
    assert torch.equal(view, wanted_view)
    labels = batch["labels"].flatten()
    loss = F.cross_entropy(lazy.view(-1, 96), labels)
    assert torch.equal(loss, F.cross_entropy(plain.view(-1, 96), labels))
    loss.backward()


def test_a_change_that_would_be_lost_is_refused(pair: Any) -> None:
    _, _, lazy = pair()
    last = lazy[:, -1]
    last.argmax(-1)
    with pytest.raises(ModelError, match="in place"):
        last.div_(2)


def test_hooks_and_kept_gradients(pair: Any, batch: Any) -> None:
    _, plain, lazy = pair()
    seen: list[Tensor] = []
    for logits in (lazy, plain):
        logits.register_hook(seen.append)
        logits.retain_grad()
        F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(lazy.grad, plain.grad)


def test_weights_that_were_changed_since_are_noticed(pair: Any, batch: Any) -> None:
    model, _, lazy = pair()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.raises(ModelError, match="changed since"):
        lazy.argmax(-1)
    with pytest.raises(ModelError, match="changed since"):
        F.cross_entropy(lazy.flatten(0, 1), batch["labels"].flatten())


def test_what_was_read_before_stays(pair: Any) -> None:
    model, plain, lazy = pair()
    lazy.argmax(-1)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert torch.equal(lazy, plain)


def test_read_without_gradients_first(pair: Any, batch: Any, gradients: Any) -> None:
    model, _, lazy = pair()
    with torch.no_grad():
        accuracy = (lazy.argmax(-1) == batch["labels"]).float().mean()
    assert not accuracy.requires_grad
    F.cross_entropy(lazy.flatten(0, 1), batch["labels"].flatten()).backward()
    assert model.lm_head.weight.grad is not None


def test_saving_and_copying(pair: Any) -> None:
    _, plain, lazy = pair()
    file = io.BytesIO()
    torch.save(lazy.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file), plain)
    assert torch.equal(copy.deepcopy(lazy.detach()), plain)


def test_what_accelerate_and_trainers_do_to_outputs(pair: Any, batch: Any) -> None:
    model, _, _ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        output = convert_outputs_to_fp32(model.forward)(**batch)
    assert output.logits.dtype == torch.float32
    assert not computed(output.logits)
    assert not computed(output.logits.detach())
    output.loss.backward()


def test_a_copy_of_the_model_has_a_head_of_its_own(pair: Any, batch: Any) -> None:
    model, _, _ = pair()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not model(**batch).logits.any()
    assert twin(**batch).logits.any()
    twin(**batch).loss.backward()
    assert twin.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad is None
