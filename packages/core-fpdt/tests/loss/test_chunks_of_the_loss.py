"""The chunked loss as a function of tensors: numbers, memory, and the rules of autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import ModelError
from core_fpdt.loss.cross_entropy import Rules, chunked_cross_entropy
from core_fpdt.loss.projection import Projection

WIDTH, CLASSES = 5, 7
REDUCTIONS = ["mean", "sum", "none"]


def make(
    tokens: int, dtype: torch.dtype = torch.float64, *, classes: int = CLASSES, seed: int = 0
) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=dtype).requires_grad_()
    head = nn.Linear(WIDTH, classes, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(classes, WIDTH, generator=generator))
        head.bias.copy_(torch.randn(classes, generator=generator))
    target = torch.randint(0, classes, (tokens,), generator=generator)
    return hidden, head, target


def projection(head: nn.Linear, rows: int) -> Projection:
    """A projection whose chunks have ``rows`` rows."""
    made = Projection.of(head, 4 * rows * head.out_features * head.weight.dtype.itemsize)
    assert made.rows == rows
    return made


def grads(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, torch.ones_like(loss))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(deadline=None)
@given(tokens=st.integers(1, 40), rows=st.integers(1, 12), seed=st.integers(0, 5), data=st.data())
def test_any_length_in_any_chunks(
    reduction: Any, tokens: int, rows: int, seed: int, data: st.DataObject
) -> None:
    hidden, head, target = make(tokens, seed=seed)
    ignored = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    target = target.masked_fill(torch.tensor(ignored), -100)
    plain = F.cross_entropy(head(hidden), target, reduction=reduction)
    loss = chunked_cross_entropy(hidden, projection(head, rows), target, Rules(reduction=reduction))
    assert torch.allclose(loss, plain, rtol=1e-12, atol=1e-12, equal_nan=True)
    inputs = hidden, head.weight, head.bias
    for ours, theirs in zip(grads(loss, *inputs), grads(plain, *inputs), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_of_nothing(reduction: Any) -> None:
    hidden, head, target = make(0)
    plain = F.cross_entropy(head(hidden), target, reduction=reduction)
    loss = chunked_cross_entropy(hidden, projection(head, 3), target, Rules(reduction=reduction))
    assert torch.equal(loss.nan_to_num(9), plain.nan_to_num(9))
    (grad,) = grads(loss, head.weight)
    assert not grad.any()


def test_gradients_against_differences() -> None:
    hidden, head, target = make(6)
    target[2] = -100
    rules = Rules(torch.linspace(0.5, 2, CLASSES), reduction="none", label_smoothing=0.2)
    made = projection(head, 4).then(torch.div, (3.0,), {}).then(torch.tanh, (), {})

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, made.with_weights(weight, bias), target, rules)

    inputs = [t.detach().clone().requires_grad_() for t in (hidden, head.weight, head.bias)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("size", [200.0, 1e4])
def test_extreme_logits(size: float) -> None:
    hidden, head, target = make(12, torch.float32)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()
        head.bias[0], head.bias[1] = size, -size
    exact = head.bias.double().expand(12, -1).log_softmax(-1)
    wanted = -exact.gather(-1, target[:, None]).mean()
    loss = chunked_cross_entropy(hidden, projection(head, 5), target, Rules())
    assert torch.allclose(loss.double(), wanted, rtol=1e-6)
    for grad in grads(loss, hidden, head.weight, head.bias):
        assert grad.isfinite().all()


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_labels_that_are_no_classes(label: int) -> None:
    hidden, head, target = make(9)
    target[7] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds") as plain:
        F.cross_entropy(head(hidden), target)
    with pytest.raises(IndexError) as found:
        chunked_cross_entropy(hidden, projection(head, 4), target, Rules())
    assert str(found.value) == str(plain.value)


@pytest.mark.parametrize("factor", [0.25, 65536.0])
def test_every_gradient_is_multiplied_by_the_one_that_arrives(factor: float) -> None:
    hidden, head, target = make(10, torch.float32)
    inputs = hidden, head.weight, head.bias
    plain = grads(F.cross_entropy(head(hidden), target), *inputs)
    loss = chunked_cross_entropy(hidden, projection(head, 4), target, Rules())
    for ours, theirs in zip(grads(loss * factor, *inputs), plain, strict=True):
        assert torch.allclose(ours, theirs * factor, rtol=1e-5, atol=1e-7 * factor)


def test_gradients_in_half_precision_are_added_up_in_float32() -> None:
    head = nn.Linear(WIDTH, 2, dtype=torch.bfloat16)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    torch.manual_seed(0)
    hidden = torch.rand(600, WIDTH, dtype=torch.bfloat16) + 0.5
    made = Projection.of(head, 1)
    assert made.rows == 1
    target = torch.zeros(600, dtype=torch.int64)
    chunked_cross_entropy(hidden, made, target, Rules(reduction="sum")).backward()
    exact = hidden.double().sum(0) / 2  # both classes are as likely
    assert torch.allclose(head.weight.grad.double(), torch.stack([-exact, exact]), rtol=2**-8)
    assert torch.equal(head.bias.grad, torch.tensor([-300.0, 300.0], dtype=torch.bfloat16))


def test_hooks_fire_once() -> None:
    hidden, head, target = make(10)
    seen: list[Tensor] = []
    head.weight.register_hook(seen.append)
    head.weight.register_post_accumulate_grad_hook(seen.append)
    chunked_cross_entropy(hidden, projection(head, 3), target, Rules()).backward()
    assert len(seen) == 2


def test_a_second_backward_pass_is_refused() -> None:
    hidden, head, target = make(10)
    loss = chunked_cross_entropy(hidden, projection(head, 3), target, Rules())
    loss.backward(retain_graph=True)
    with pytest.raises(ModelError, match="second backward"):
        loss.backward()


def test_gradients_of_gradients_are_refused() -> None:
    hidden, head, target = make(10)
    loss = chunked_cross_entropy(hidden, projection(head, 3), target, Rules())
    with pytest.raises(ModelError, match="gradients of gradients"):
        torch.autograd.grad(loss, hidden, create_graph=True)


class Sizes(TorchDispatchMode):
    """What was made: the largest tensors, and their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.shapes += [value.shape for value in made if isinstance(value, Tensor)]
        return result


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_tensor_has_all_logits(reduction: Any) -> None:
    hidden, head, target = make(64, torch.float32, classes=500)
    with Sizes() as sizes:
        loss = chunked_cross_entropy(
            hidden, projection(head, 8), target, Rules(reduction=reduction)
        )
        loss.sum().backward()
    assert max(shape.numel() for shape in sizes.shapes) == 8 * 500


def test_a_frozen_head_costs_no_gradient() -> None:
    hidden, head, target = make(64, torch.float32, classes=501)
    head.requires_grad_(False)
    with Sizes() as sizes:
        chunked_cross_entropy(hidden, projection(head, 8), target, Rules()).backward()
    assert hidden.grad is not None
    assert torch.Size((501, WIDTH)) not in sizes.shapes


def test_evaluation_makes_no_gradient() -> None:
    hidden, head, target = make(64, torch.float32, classes=501)
    with Sizes() as sizes, torch.no_grad():
        chunked_cross_entropy(hidden, projection(head, 8), target, Rules())
    assert torch.Size((64, WIDTH)) not in sizes.shapes
    assert torch.Size((501, WIDTH)) not in sizes.shapes


def test_chunks_stay_below_their_limit() -> None:
    _, head, _ = make(1, torch.float32, classes=1000)
    assert Projection.of(head, 2**20).rows == 64 * (2**20 // (64 * 1000 * 4 * 4))
    assert Projection.of(head, 1024).rows == 1
    assert Projection.of(head.double(), 2**20).rows == 32
