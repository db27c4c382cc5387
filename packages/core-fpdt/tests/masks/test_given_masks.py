"""Masks that somebody made, and masks that are none."""

from __future__ import annotations

import pytest
import torch

from core.errors import ModelError
from core_fpdt.masks import Kind, LazyMask, edges

SEEN = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(0)) > 0.5


@pytest.mark.parametrize("cuts", [[], [4], [1, 5, 9]])
def test_booleans_of_every_head_are_kept(assembled, cuts) -> None:
    assert torch.equal(assembled(LazyMask.of(SEEN), cuts), SEEN)
    assert torch.equal(LazyMask.of(SEEN).dense(), SEEN)


def test_a_given_mask_is_classified() -> None:
    mask = LazyMask.of(torch.ones(1, 1, 8, 8).tril().bool())
    kinds = [mask.tile((4, 8), keys).kind for keys in ((0, 4), (4, 8))]
    assert kinds == [Kind.FULL, Kind.CAUSAL]
    assert mask.tile((2, 6), (1, 5)).kind == Kind.PARTIAL
    assert mask.tile((0, 4), (4, 8)).kind == Kind.EMPTY
    assert edges(8, 3, mask) == [0, 3, 6, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", ["minimum", "infinite"])
def test_masks_that_are_added_hide_the_same(dtype, hidden) -> None:
    value = torch.finfo(dtype).min if hidden == "minimum" else -torch.inf
    added = torch.zeros(SEEN.shape, dtype=dtype).masked_fill(~SEEN, value)
    assert torch.equal(LazyMask.of(added).dense(), SEEN)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32])
def test_the_smallest_number_of_a_narrower_type_hides_too(narrow) -> None:
    added = torch.zeros(SEEN.shape, dtype=narrow).masked_fill(~SEEN, torch.finfo(narrow).min)
    assert torch.equal(LazyMask.of(added.double()).dense(), SEEN)


@pytest.mark.parametrize("value", [-1.0, 1.0, -1e4, torch.nan, torch.inf])
def test_a_bias_is_no_mask(value) -> None:
    bias = torch.zeros(1, 1, 4, 4)
    bias[0, 0, 2, 1] = value
    with pytest.raises(ModelError, match="it is a bias"):
        LazyMask.of(bias)


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.ones(2, 8, dtype=torch.bool), r"its shape is \(2, 8\)"),
        (torch.ones(1, 1, 4, 4, dtype=torch.long), "its dtype is torch.int64"),
    ],
)
def test_what_else_is_no_mask(mask, why) -> None:
    with pytest.raises(ModelError, match=why):
        LazyMask.of(mask)
