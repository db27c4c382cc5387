"""Blocks of a row, merged one after the other, are attention over the whole row; so are gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from core.softmax import Partial, merge
from core_fpdt.kernels.cpu_flash import CPU_FLASH
from core_fpdt.kernels.merging import Merging, accumulate
from core_fpdt.kernels.reference import REFERENCE

KERNELS = pytest.mark.parametrize("kernel", [REFERENCE, CPU_FLASH], ids=["reference", "cpu_flash"])
HYPOTHESIS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@KERNELS
@HYPOTHESIS
@given(data=st.data())
def test_any_shape_and_split(kernel, data, attention, error) -> None:
    key_heads, group = data.draw(st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 1)]))
    columns = data.draw(st.integers(1, 40))
    kind = data.draw(st.sampled_from(["full", "causal", "holes", "shared holes"]))
    rows = columns if kind == "causal" else data.draw(st.integers(1, 40))
    case = attention(
        kind,
        batch=data.draw(st.integers(1, 2)),
        heads=(key_heads * group, key_heads),
        tokens=(rows, columns),
        widths=data.draw(st.sampled_from([(8, 8), (12, 8), (3, 5)])),
        strided=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    if not case.visible.any():
        return
    cuts = data.draw(st.lists(st.integers(1, columns), max_size=5, unique=True))
    edges = sorted({0, *cuts, columns})
    truth, gradients = case.truth()
    found, found_gradients = case.run(kernel, edges)
    assert error(found, truth) < 1e-12
    assert error(found_gradients, gradients) < 1e-12


@KERNELS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-3)], ids=str
)
@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_blocks_whose_scores_differ_by_a_thousand(
    kernel, dtype, tolerance, order, attention, error
) -> None:
    # A score of 2000 has 12 bits behind the point in float32, and a weight as many digits.
    case = attention(tokens=(24, 24), dtype=dtype)
    # One more dimension of queries and keys moves all scores of a block.
    shift = torch.tensor([0.0, 1000.0, 2000.0][::order]).repeat_interleave(8) / case.scores.scale
    case.query[..., -1], case.key[..., -1] = 1, shift.to(dtype)
    truth, gradients = case.truth()
    found, found_gradients = case.run(kernel, [0, 8, 16, 24])
    assert float(truth.lse.min()) > 1900
    assert error(found, truth) < tolerance
    assert error(found_gradients, gradients) < 3 * tolerance


@KERNELS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-3)], ids=str
)
def test_logits_of_ten_thousand(kernel, dtype, tolerance, attention, error) -> None:
    case = attention("holes", tokens=(32, 32), dtype=dtype)
    sign = torch.where(torch.arange(32) % 2 == 0, 1.0, -1.0)
    case.visible[:, :, :5, ::2] = False
    case.query[..., -1], case.key[..., -1] = 100, (sign * 100 / case.scores.scale).to(dtype)
    truth, gradients = case.truth()
    seen = truth.lse[truth.lse > -torch.inf]
    assert seen.max() > 9990
    assert seen.min() < -9990
    found, found_gradients = case.run(kernel, [0, 11, 32])
    assert error(found, truth) < tolerance
    assert error(found_gradients[2:], gradients[2:]) < tolerance
    # Gradients of scores are multiplied by keys of 400 and queries of 100.
    assert error(found_gradients[:2], gradients[:2]) < 100 * tolerance


@KERNELS
def test_rows_that_are_blind_in_some_blocks_or_all(kernel, attention, error) -> None:
    case = attention("holes", tokens=(12, 24))
    case.visible[:, :, 0:3, :8] = False
    case.visible[:, :, 3:6, 8:16] = False
    case.visible[:, :, 6:9, 16:] = False
    case.visible[:, :, 9] = False
    truth, gradients = case.truth()
    found, found_gradients = case.run(kernel, [0, 8, 16, 24])
    assert error(found, truth) < 1e-12
    assert error(found_gradients, gradients) < 1e-12
    assert (found.lse[:, :, 9] == -torch.inf).all()


@pytest.mark.parametrize("chunk", [128, 512])
def test_bfloat16_errs_hardly_more_than_in_one_call(chunk: int, attention, error) -> None:
    """Merging and adding up costs little more than the rounding of what kernels return."""
    case = attention("causal", batch=1, tokens=(1024, 1024), widths=(64, 64), dtype=torch.bfloat16)
    truth, gradients = case.truth()
    errors = []
    for size in (1024, chunk):
        chunks = range(0, 1024, size)
        outputs, sums = [], [torch.zeros_like(x, dtype=torch.float32) for x in case.inputs]
        for begin in chunks:
            rows = slice(begin, begin + size)
            row = replace(
                case,
                query=case.query[:, :, rows],
                grad=case.grad[:, :, rows],
                visible=case.visible[:, :, rows],
            )
            found, more = row.run(CPU_FLASH, [*range(0, 1024, size), 1024])
            outputs.append(found.output.bfloat16())
            sums[0][:, :, rows] += more.query
            sums[1] += more.key
            sums[2] += more.value
        errors.append([_rms(torch.cat(outputs, 2), truth.output)])
        errors[-1] += [_rms(x, y) for x, y in zip(sums, gradients, strict=True)]
    for chunked, once in zip(errors[1], errors[0], strict=True):
        assert chunked < 1.4 * once


def test_a_kernel_that_merges_is_asked_to(attention) -> None:
    case = attention()
    where, tile = next(case.blocks([0, 19]))
    key, value = case.key[:, :, where], case.value[:, :, where]

    class Own(type(REFERENCE)):
        def merge_forward(self, running, query, key, value, tile, scores) -> Partial:
            made = self.forward(query, key, value, tile, scores)
            return merge(running, Partial(made.output, made.lse + 1))

    assert isinstance(Own(), Merging)
    assert not isinstance(REFERENCE, Merging)
    first = accumulate(Own(), None, case.query, key, value, tile, case.scores)
    torch.testing.assert_close(first.lse, case.truth()[0].lse)
    second = accumulate(Own(), first, case.query, key, value, tile, case.scores)
    torch.testing.assert_close(second.lse, torch.logaddexp(first.lse, first.lse + 1))


def _rms(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).square().mean().sqrt())
