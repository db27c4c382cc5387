"""The own kernels are attention and its gradients, alone and block after block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core.softmax import Partial, merge
from core_fpdt.kernels.choosing import choose
from core_fpdt.kernels.contract import Scores
from core_fpdt.kernels.merging import Merging
from core_fpdt.kernels.triton.kernel import TRITON
from core_fpdt.kernels.triton.launching import attend, differentiate
from core_fpdt.masks.tiles import Kind, Tile

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HYPOTHESIS = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@HYPOTHESIS
@given(data=st.data())
def test_any_shape_and_split(data, attention, error) -> None:
    key_heads, group = data.draw(st.sampled_from([(1, 1), (2, 2), (1, 3)]))
    columns = data.draw(st.integers(1, 50))
    kind = data.draw(st.sampled_from(["full", "causal", "holes", "shared holes"]))
    rows = columns if kind == "causal" else data.draw(st.integers(1, 50))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    case = attention(
        kind,
        batch=data.draw(st.integers(1, 2)),
        heads=(key_heads * group, key_heads),
        tokens=(rows, columns),
        widths=data.draw(st.sampled_from([(16, 16), (24, 8), (5, 40)])),
        softcap=data.draw(st.sampled_from([None, 1.5])),
        strided=data.draw(st.booleans()),
        dtype=dtype,
        seed=data.draw(st.integers(0, 99)),
    )
    if not case.visible.any():
        return
    cuts = data.draw(st.lists(st.integers(1, columns), max_size=2, unique=True))
    truth, gradients = case.truth()
    found, found_gradients = case.run(TRITON, sorted({0, *cuts, columns}))
    assert error(found, truth) < TOLERANCE[dtype]
    assert error(found_gradients, gradients) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("kind", "softcap", "dtype", "tokens"),
    [
        ("full", None, torch.float16, 40),
        ("causal", None, torch.bfloat16, 140),
        ("causal", 0.7, torch.float32, 70),
        ("shared holes", 0.7, torch.float32, 70),
    ],
)
def test_more_than_one_program(kind, softcap, dtype, tokens, attention, error) -> None:
    shape = {"tokens": (tokens, tokens), "batch": 1, "heads": (2, 1)}
    case = attention(kind, softcap=softcap, dtype=dtype, **shape)
    truth, gradients = case.truth()
    found, found_gradients = case.run(TRITON, [0, tokens // 2, tokens])
    assert found.output.dtype == torch.float32
    assert error(found, truth) < TOLERANCE[dtype]
    assert error(found_gradients, gradients) < 2 * TOLERANCE[dtype]
    assert {x.dtype for x in TRITON.backward(*first(case, found, tokens // 2))} == {torch.float32}


def first(case, merged, end):
    where, tile = next(case.blocks([0, end]))
    key, value = case.key[:, :, where], case.value[:, :, where]
    output = merged.output.to(case.query.dtype)
    return case.grad, case.query, key, value, output, merged.lse, tile, case.scores


@pytest.mark.parametrize("tokens", [(7, 40), (40, 7)])
def test_causal_blocks_start_at_the_first_key_of_the_tile(tokens, attention, error) -> None:
    case = attention(tokens=tokens, dtype=torch.float32)
    case.visible.copy_(torch.ones_like(case.visible).tril())
    truth, gradients = case.truth()
    tile = Tile(Kind.CAUSAL, (0, tokens[0]), (0, tokens[1]))
    found = TRITON.forward(*case.inputs, tile, case.scores)
    assert error(found, truth) < 3e-6
    ends = case.grad, *case.inputs, *found, tile, case.scores
    assert error(TRITON.backward(*ends), gradients) < 3e-6


def test_scores_that_differ_by_a_thousand(attention, error) -> None:
    case = attention(tokens=(24, 24), dtype=torch.float32)
    shift = torch.tensor([0.0, 2000.0, 1000.0]).repeat_interleave(8) / case.scores.scale
    case.query[..., -1], case.key[..., -1] = 1, shift
    truth, gradients = case.truth()
    found, found_gradients = case.run(TRITON, [0, 8, 16, 24])
    assert float(truth.lse.min()) > 1900
    assert error(found, truth) < 1e-3
    assert error(found_gradients, gradients) < 1e-3


def test_the_merge_is_that_of_core(attention, error) -> None:
    case = attention("holes", tokens=(20, 40), dtype=torch.float32)
    case.visible[:, :, :4, :20] = False
    case.visible[:, :, 4:8, 20:] = False
    case.visible[:, :, 8:10] = False
    (_, left), (where, right) = case.blocks([0, 20, 40])
    first = TRITON.forward(
        case.query, case.key[:, :, :20], case.value[:, :, :20], left, case.scores
    )
    # Whatever a kernel leaves where nothing is seen.
    first.output[first.lse == -torch.inf] = torch.nan
    before = Partial(*(x.clone() for x in first))
    rest = case.query, case.key[:, :, where], case.value[:, :, where], right, case.scores
    assert isinstance(TRITON, Merging)
    found = TRITON.merge_forward(first, *rest)
    wanted = merge(first, TRITON.forward(*rest))
    assert error(found, wanted) < 1e-6
    torch.testing.assert_close(first, before, rtol=0, atol=0, equal_nan=True)
    half = TRITON.merge_forward(Partial(first.output.bfloat16(), first.lse), *rest)
    assert error(half, wanted) < 1e-2


def test_blind_rows_get_no_gradient(attention) -> None:
    case = attention("holes", tokens=(20, 20), dtype=torch.float32)
    case.visible[:, :, 5:9] = False
    found, gradients = case.run(TRITON, [0, 20])
    assert (found.lse[:, :, 5:9] == -torch.inf).all()
    assert (found.output[:, :, 5:9] == 0).all()
    assert (gradients.query[:, :, 5:9] == 0).all()
    assert all(x.isfinite().all() for x in gradients)


def test_delta_is_enough(attention, error) -> None:
    case = attention("causal", dtype=torch.float32)
    truth, gradients = case.truth()
    tile = Tile(Kind.CAUSAL, (0, 19), (0, 19))
    delta = (case.grad.double() * truth.output).sum(-1).float()
    lse = attend(*case.inputs, tile, case.scores).lse
    found = differentiate(case.grad, *case.inputs, delta, lse, tile, case.scores)
    assert error(found, gradients) < 3e-6


def test_it_can_be_asked_for_by_name(attention) -> None:
    chooser = choose("triton", torch.device("cpu"), torch.float32)
    case = attention(dtype=torch.float32)
    tile = Tile(Kind.FULL, (0, 19), (0, 19))
    assert chooser(*case.inputs, tile, Scores(1.0, 2.0)) is TRITON
    wide = torch.zeros(1, 1, 4, 300)
    assert "256 wide" in TRITON.works(wide, wide, wide, tile, case.scores)
    assert "float64" in TRITON.unavailable(torch.device("cpu"), torch.float64)
