"""What only a device can show: fused operators, matrix units, and which kernel takes what."""

from __future__ import annotations

import pytest
import torch

from core_fpdt.kernels.choosing import KERNELS, choose
from core_fpdt.kernels.contract import Scores
from core_fpdt.masks.tiles import Kind, Tile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 5e-6}
NAMES = ["aten_flash", "cudnn", "triton", "reference"]


def on_device(case):
    from dataclasses import replace

    moved = {
        name: getattr(case, name).cuda() for name in ("query", "key", "value", "grad", "visible")
    }
    return replace(case, **moved)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["full", "causal", "holes", "shared holes"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("widths", [(128, 128), (64, 64), (192, 128), (96, 80)], ids=str)
def test_blocks_equal_autograd(name, dtype, kind, softcap, widths, attention, error) -> None:
    shape = {"heads": (8, 2), "tokens": (300, 300), "widths": widths}
    case = on_device(attention(kind, softcap=softcap, dtype=dtype, **shape))
    kernel = KERNELS[name]
    edges = [0, 150, 300]
    for where, tile in case.blocks(edges):
        part = case.query, case.key[:, :, where], case.value[:, :, where]
        if why := kernel.works(*part, tile, case.scores):
            pytest.skip(why)
    truth, gradients = case.truth()
    found, found_gradients = case.run(kernel, edges)
    assert error(found, truth) < TOLERANCE[dtype]
    assert error(found_gradients, gradients) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strided", [False, True])
def test_causal_squares_in_chunks(name, strided, attention, error) -> None:
    """Rows of chunks: dense blocks and a square on the diagonal."""
    shape = {"heads": (8, 2), "tokens": (512, 512), "widths": (128, 128), "strided": strided}
    case = on_device(attention("causal", dtype=torch.bfloat16, **shape))
    kernel = KERNELS[name]
    from dataclasses import replace

    truth, _ = case.truth()
    for begin in range(0, 512, 128):
        rows = slice(begin, begin + 128)
        row = replace(
            case,
            query=case.query[:, :, rows],
            grad=case.grad[:, :, rows],
            visible=case.visible[:, :, rows],
        )
        row_truth, gradients = row.truth()
        edges = [*range(0, begin + 129, 128), 512]
        where, tile = list(row.blocks(edges))[-1]
        if why := kernel.works(
            row.query, row.key[:, :, where], row.value[:, :, where], tile, row.scores
        ):
            pytest.skip(why)
        found, found_gradients = row.run(kernel, edges)
        assert error(found, row_truth) < 3e-2
        assert error(found_gradients, gradients) < 6e-2
        torch.testing.assert_close(row_truth.output, truth.output[:, :, rows])


def test_auto_takes_the_fastest_that_can() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    chooser = choose("auto", device, torch.bfloat16)
    query = torch.randn(1, 8, 256, 128, device=device, dtype=torch.bfloat16)
    key = torch.randn(1, 2, 256, 128, device=device, dtype=torch.bfloat16)
    ranges = (0, 256), (0, 256)
    full = chooser(query, key, key, Tile(Kind.FULL, *ranges), Scores(0.1)).name
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    assert full == ("cudnn" if hopper else "aten_flash")
    assert chooser(query, key, key, Tile(Kind.FULL, *ranges), Scores(0.1, 30.0)).name == "triton"


def test_ten_thousand_in_scores(attention, error) -> None:
    case = attention("holes", tokens=(64, 64), dtype=torch.float32)
    sign = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    case.query[..., -1], case.key[..., -1] = 100, sign * 100 / case.scores.scale
    case = on_device(case)
    truth, gradients = case.truth()
    found, found_gradients = case.run(KERNELS["triton"], [0, 20, 64])
    assert error(found, truth) < 5e-3
    assert error(found_gradients, gradients) < 5e-3
