"""Attention in parts equals attention over everything, gradients included."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from core.softmax import Partial, attend, merge

GEN = torch.Generator().manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=GEN, dtype=torch.float64).to(dtype)


def inputs(
    heads: int = 4, groups: int = 2, tq: int = 5, tk: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    kv = heads // groups
    return (
        random(2, heads, tq, 8, dtype=dtype),
        random(2, kv, tk, 8, dtype=dtype),
        random(2, kv, tk, 6, dtype=dtype),
    )


def by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Partial:
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    output = scores.softmax(-1).nan_to_num() @ value.repeat_interleave(groups, 1)
    return Partial(output, scores.logsumexp(-1))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attend_equals_full_softmax(groups: int) -> None:
    query, key, value = inputs(groups=groups)
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)
    torch.testing.assert_close(attend(query, key, value), by_hand(query, key, value))
    torch.testing.assert_close(
        attend(query, key, value, mask=mask), by_hand(query, key, value, mask)
    )


def test_additive_and_boolean_masks_agree_by_head() -> None:
    query, key, value = inputs()
    mask = random(2, 4, 5, 7) > 0
    additive = torch.zeros(2, 4, 5, 7, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(
        attend(query, key, value, mask=mask), attend(query, key, value, mask=additive)
    )


def test_scale_replaces_the_default() -> None:
    query, key, value = inputs()
    torch.testing.assert_close(
        attend(query, key, value, scale=2.0), by_hand(query * 2 * 8**0.5, key, value)
    )


@pytest.mark.parametrize("additive", [False, True])
def test_row_without_keys_is_zero_and_has_zero_gradient(additive: bool) -> None:
    query, key, value = (t.requires_grad_() for t in inputs())
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[3] = False
    given_mask = torch.zeros(5, 7).masked_fill(~mask, -torch.inf) if additive else mask
    output, lse = attend(query, key, value, mask=given_mask)
    assert (output[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == -torch.inf).all()
    (output.sum() + lse[lse.isfinite()].sum()).backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (query, key, value))
    assert query.grad is not None
    assert (query.grad[:, :, 3] == 0).all()


def test_no_keys_at_all() -> None:
    query, key, value = inputs()
    output, lse = attend(query, key[:, :, :0], value[:, :, :0])
    assert (output == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_accumulates_at_least_in_float32(dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    output, lse = attend(query, key, value)
    assert output.dtype == lse.dtype == wide
    exact = by_hand(query.double(), key.double(), value.double())
    torch.testing.assert_close(output.double(), exact.output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact.lse, atol=1e-5, rtol=1e-5)


@given(cuts=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_merge_of_any_cut_is_the_whole(cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 2, 12, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(12, 12, generator=generator) > 0.5
    edges = [0, *sorted(cuts), 12]
    parts = [
        attend(query, key[:, :, a:b], value[:, :, a:b], mask=mask[:, a:b])
        for a, b in pairwise(edges)
    ]
    torch.testing.assert_close(merge(*parts), attend(query, key, value, mask=mask))


@given(gap=st.floats(-2000, 2000))
@settings(max_examples=40, deadline=None)
def test_merge_is_finite_for_any_gap(gap: float) -> None:
    left = Partial(torch.full((1, 1, 1, 2), 3.0), torch.zeros(1, 1, 1))
    right = Partial(torch.full((1, 1, 1, 2), 5.0), torch.full((1, 1, 1), gap))
    output, lse = merge(left, right)
    share = torch.tensor(gap, dtype=torch.float64).sigmoid().item()
    # A few roundings of float32, not the tolerance of float64.
    expected = torch.full_like(output, 3 + 2 * share)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.logaddexp(left.lse, right.lse))


def test_merge_ignores_what_lies_in_empty_rows() -> None:
    full = Partial(torch.ones(1, 1, 2, 3), torch.tensor([[[0.5, -torch.inf]]]))
    empty = Partial(torch.full((1, 1, 2, 3), torch.nan), torch.full((1, 1, 2), -torch.inf))
    output, lse = merge(full, empty, empty)
    assert output[0, 0].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert lse[0, 0].tolist() == [0.5, -torch.inf]


def test_merge_of_empty_rows_has_zero_gradient() -> None:
    lses = [torch.full((1, 1, 2), -torch.inf, requires_grad=True) for _ in range(2)]
    outputs = [torch.full((1, 1, 2, 3), torch.nan, requires_grad=True) for _ in range(2)]
    output, _ = merge(*(Partial(o, lse) for o, lse in zip(outputs, lses, strict=True)))
    output.sum().backward()
    assert all(t.grad is not None and (t.grad == 0).all() for t in [*lses, *outputs])


def in_parts(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        attend(query, key[:, :, c], value[:, :, c], mask=mask[:, c])
        for c in (slice(0, 2), slice(2, 3), slice(3, 7))
    ]
    output, lse = merge(merge(*parts[:2]), parts[2])
    return output, lse.masked_fill(lse == -torch.inf, 0)


def test_gradients_of_parts() -> None:
    query, key, value = (t[:1].requires_grad_() for t in inputs(heads=2, tq=3))
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1], [0] * 7, [0, 0, 1, 1, 0, 0, 0]]).bool()
    assert torch.autograd.gradcheck(partial(in_parts, mask=mask), (query, key, value))
    weights = random(1, 2, 3, 6)
    wanted = torch.autograd.grad(
        (by_hand(query, key, value, mask[:1]).output * weights).sum(), (query, key, value)
    )
    found = torch.autograd.grad(
        (in_parts(query, key, value, mask[:1])[0] * weights).sum(), (query, key, value)
    )
    torch.testing.assert_close(found, wanted)


def test_gradients_of_merge_alone() -> None:
    outputs = [random(1, 1, 3, 2).requires_grad_() for _ in range(3)]
    lses = [(random(1, 1, 3) * 3).requires_grad_() for _ in range(3)]

    def run(*flat: Tensor) -> tuple[Tensor, Tensor]:
        return merge(*(Partial(o, lse) for o, lse in zip(flat[:3], flat[3:], strict=True)))

    assert torch.autograd.gradcheck(run, (*outputs, *lses))


def test_running_merge_of_bfloat16_parts_stays_precise() -> None:
    query, key, value = inputs(tk=512, dtype=torch.bfloat16)
    running = attend(query, key[:, :, :1], value[:, :, :1])
    for i in range(1, 512):
        running = merge(running, attend(query, key[:, :, i : i + 1], value[:, :, i : i + 1]))
    exact = by_hand(query.double(), key.double(), value.double())
    assert running.output.dtype == torch.float32
    torch.testing.assert_close(running.output.double(), exact.output, atol=1e-5, rtol=1e-5)


def test_merge_takes_half_outputs_and_answers_in_float32() -> None:
    part = Partial(torch.ones(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1))
    assert merge(part, part).output.dtype == torch.float32
    assert merge(part, Partial(part.output, part.lse.double())).output.dtype == torch.float64


def test_misuse_is_refused() -> None:
    query, key, value = inputs()
    part = attend(query, key, value)
    with pytest.raises(ValueError, match="at least one"):
        merge()
    with pytest.raises(TypeError, match="bfloat16"):
        merge(part, Partial(part.output, part.lse.bfloat16()))
    with pytest.raises(ValueError, match="differ in shape"):
        merge(part, Partial(part.output[:, :2], part.lse[:, :2]))
    with pytest.raises(ValueError, match="do not fit"):
        attend(query[:, :3], key, value)
    with pytest.raises(ValueError, match="batch, heads"):
        attend(query[0], key[0], value[0])
