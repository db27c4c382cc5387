"""What torch's CUDA operators are given, where there is no device.

Their own meta implementations check arguments and shapes. Numbers are checked with operators that
are registered for CPUs here: they insist on what the real ones insist on, and compute by scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from core_fpdt.kernels.contract import Scores
from core_fpdt.kernels.cuda import ATEN_FLASH, CUDNN, holes, misfit
from core_fpdt.kernels.reference import REFERENCE
from core_fpdt.masks.tiles import Kind, Tile

BOTH = pytest.mark.parametrize("kernel", [ATEN_FLASH, CUDNN], ids=["aten_flash", "cudnn"])
LAYOUTS = {
    "plain": {"widths": (16, 16)},
    "narrow values": {"widths": (24, 16)},
    "wide values": {"widths": (16, 24)},
    "strided": {"widths": (16, 16), "strided": True},
    "one head": {"widths": (16, 16), "heads": (1, 1)},
}
FULL = Tile(Kind.FULL, (0, 19), (0, 19))


def checked(*tensors: Tensor, causal: bool) -> Tile:
    query, key = tensors[:2]
    assert all(x.stride(-1) == 1 for x in tensors)
    assert all(x.shape[-1] % 8 == 0 for x in tensors)
    ranges = (0, query.shape[2]), (0, key.shape[2])
    return Tile(Kind.CAUSAL if causal else Kind.FULL, *ranges)


def flash_forward(
    query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale=None
):
    assert (cum_q, cum_k, dropout, debug) == (None, None, 0, False)
    assert (max_q, max_k) == (query.shape[1], key.shape[1])
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    tile = checked(query, key, value, causal=causal)
    output, lse = REFERENCE.forward(query, key, value, tile, Scores(scale))
    nothing = query.new_empty(0)
    return output.transpose(1, 2).contiguous(), lse, nothing, nothing, nothing


def flash_backward(
    grad, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, *state, scale
):
    assert (dropout, max_q, max_k) == (0, query.shape[1], key.shape[1])
    assert lse.is_contiguous()
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    tile = checked(query, key, value, causal=causal)
    ends = grad.transpose(1, 2), query, key, value, out.transpose(1, 2), lse
    return tuple(x.transpose(1, 2) for x in REFERENCE.backward(*ends, tile, Scores(scale)))


def cudnn_forward(query, key, value, bias, lse, dropout=0.0, causal=False, *, scale=None):
    # Arguments that are their defaults are left out by the dispatcher.
    assert (bias, lse, dropout) == (None, True, 0)
    tile = checked(query, key, value, causal=causal)
    output, found = REFERENCE.forward(query, key, value, tile, Scores(scale))
    nothing = query.new_empty(0)
    sizes = query.shape[2], key.shape[2]
    return output, found.unsqueeze(-1), nothing, nothing, *sizes, nothing, nothing, nothing


def cudnn_backward(grad, query, key, value, out, lse, seed, offset, *rest, scale=None):
    assert rest[:3] == (None, None, None)
    max_q, max_k, dropout, causal = rest[3:]
    assert (max_q, max_k, dropout) == (query.shape[2], key.shape[2], 0)
    assert lse.shape == (*query.shape[:3], 1)
    assert grad.stride() == out.stride()
    tile = checked(query, key, value, causal=causal)
    ends = grad, query, key, value, out, lse.squeeze(-1)
    return tuple(REFERENCE.backward(*ends, tile, Scores(scale)))


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """The CUDA operators for CPUs."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention", cudnn_forward, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
        yield


@BOTH
@pytest.mark.parametrize("kind", ["full", "causal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_survive_layouts_and_padding(
    on_cpu, kernel, kind, layout, attention, error
) -> None:
    case = attention(kind, **LAYOUTS[layout])
    (_, tile), *_ = case.blocks([0, 19])
    truth, gradients = case.truth()
    found = kernel.forward(*case.inputs, tile, case.scores)
    assert error(found, truth) < 1e-12
    grad = case.grad.transpose(1, 2).contiguous().transpose(1, 2)
    ends = case.query, case.key, case.value, truth.output, truth.lse
    assert error(kernel.backward(grad, *ends, tile, case.scores), gradients) < 1e-12


def test_flash_attention_gets_widths_in_eights(on_cpu, attention, error) -> None:
    case = attention(widths=(5, 7))
    truth, gradients = case.truth()
    found = ATEN_FLASH.forward(*case.inputs, FULL, case.scores)
    assert error(found, truth) < 1e-12
    ends = case.grad, *case.inputs, *truth
    assert error(ATEN_FLASH.backward(*ends, FULL, case.scores), gradients) < 1e-12


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_take_these_arguments(kernel, layout, attention) -> None:
    """The meta implementations of torch itself."""
    case = attention("causal", dtype=torch.bfloat16, **LAYOUTS[layout])
    query, key, value, grad = (x.to("meta") for x in (*case.inputs, case.grad))
    tile = Tile(Kind.CAUSAL, (0, 19), (0, 19))
    output, lse = kernel.forward(query, key, value, tile, case.scores)
    assert (output.shape, output.dtype) == (grad.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
    made = kernel.backward(grad, query, key, value, output, lse, tile, case.scores)
    assert [x.shape for x in made] == [query.shape, key.shape, value.shape]


def test_what_is_left_to_other_kernels(attention) -> None:
    case = attention(tokens=(19, 7))
    query, key, _ = case.inputs
    short = (0, 19), (0, 7)
    assert holes(query, key, Tile(Kind.FULL, *short), Scores(1.0)) == ""
    assert "square" in holes(query, key, Tile(Kind.CAUSAL, *short), Scores(1.0))
    assert "mask" in holes(query, key, Tile(Kind.PARTIAL, *short), Scores(1.0))
    assert "softcap" in holes(query, key, Tile(Kind.FULL, *short), Scores(1.0, 3.0))
    assert "no tokens" in holes(query[:, :, :0], key, Tile(Kind.FULL, *short), Scores(1.0))


@pytest.mark.parametrize(
    ("widths", "hopper", "ampere"),
    [
        ((128, 128), "", ""),
        ((192, 128), "", "128 wide"),
        ((256, 256), "", "128 wide"),
        ((264, 128), "256 wide", "128 wide"),
        ((64, 60), "multiples of 8", "multiples of 8"),
    ],
)
def test_heads_that_cudnn_takes(widths, hopper, ampere) -> None:
    query, value = (torch.empty(1, 1, 1, width, device="meta") for width in widths)
    for wanted, found in ((hopper, True), (ampere, False)):
        reason = misfit(query, value, hopper=found)
        assert wanted in reason
        assert bool(wanted) == bool(reason)


def test_cudnn_yields_where_results_have_to_be_equal(attention) -> None:
    case = attention()
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in CUDNN.works(*case.inputs, FULL, case.scores)
    finally:
        torch.use_deterministic_algorithms(False)
