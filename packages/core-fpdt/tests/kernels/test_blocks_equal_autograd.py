"""One block, forwards and backwards, is what autograd finds in float64."""

from __future__ import annotations

import pickle

import pytest
import torch

from core_fpdt.kernels.choosing import KERNELS
from core_fpdt.kernels.contract import Kernel, Scores
from core_fpdt.kernels.cpu_flash import CPU_FLASH
from core_fpdt.kernels.reference import REFERENCE, Reference
from core_fpdt.masks.tiles import Kind, Tile

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SHAPES = {
    "square": {},
    "wide": {"tokens": (7, 33)},
    "tall": {"tokens": (33, 7)},
    "one token": {"tokens": (1, 1)},
    "one query": {"tokens": (1, 29)},
    "one key": {"tokens": (29, 1)},
    "one head": {"heads": (1, 1), "batch": 1},
    "all heads": {"heads": (3, 3)},
    "narrow values": {"widths": (24, 8)},
    "wide values": {"widths": (8, 24)},
    "odd widths": {"widths": (5, 7)},
    "strided": {"strided": True, "widths": (24, 16)},
}
ON_CPU = pytest.mark.parametrize(
    "kernel",
    [REFERENCE, Reference(score_bytes=900), CPU_FLASH],
    ids=["reference", "reference in slices", "cpu_flash"],
)


@ON_CPU
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["full", "causal", "holes", "shared holes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_kind(kernel: Kernel, dtype, kind, shape, attention, error) -> None:
    if kind == "causal" and shape in ("wide", "tall", "one query", "one key"):
        pytest.skip("tested by name below")
    case = attention(kind, dtype=dtype, **SHAPES[shape])
    truth, gradients = case.truth()
    edges = [0, case.key.shape[2]]
    found, found_gradients = case.run(kernel, edges)
    assert found.lse.dtype == torch.promote_types(dtype, torch.float32)
    assert error(found, truth) < TOLERANCE[dtype]
    assert error(found_gradients, gradients) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("kernel", [REFERENCE, Reference(score_bytes=900)])
@pytest.mark.parametrize("kind", ["full", "causal", "holes"])
def test_softcaps(kernel: Kernel, kind, attention, error) -> None:
    case = attention(kind, softcap=0.7)
    truth, gradients = case.truth()
    found, found_gradients = case.run(kernel, [0, 19])
    assert error(found, truth) < 1e-12
    assert error(found_gradients, gradients) < 1e-12
    uncapped = attention(kind).truth()[0]
    assert error(found, uncapped) > 1e-2, "the softcap shows"


@ON_CPU
@pytest.mark.parametrize("tokens", [(7, 19), (19, 7), (1, 5), (5, 1)])
def test_causal_blocks_start_at_the_first_key_of_the_tile(kernel, tokens, attention, error) -> None:
    case = attention(tokens=tokens)
    tile = Tile(Kind.CAUSAL, (0, tokens[0]), (0, tokens[1]))
    mask = torch.ones(1, 1, *tokens, dtype=torch.bool).tril()
    found = kernel.forward(*case.inputs, tile, case.scores)
    masked = REFERENCE.forward(
        *case.inputs, Tile(Kind.PARTIAL, tile.queries, tile.keys, lambda: mask), case.scores
    )
    assert error(found, masked) < 1e-12


@ON_CPU
def test_rows_that_see_nothing_are_zero(kernel: Kernel, attention) -> None:
    case = attention("holes", dtype=torch.float32)
    case.visible[0, 1, 3:9] = False
    found, gradients = case.run(kernel, [0, 19])
    assert (found.lse[0, 1, 3:9] == -torch.inf).all()
    assert (found.output[0, 1, 3:9] == 0).all()
    assert (gradients.query[0, 1, 3:9] == 0).all()
    assert all(x.isfinite().all() for x in gradients)


@ON_CPU
def test_inputs_are_left_alone(kernel: Kernel, attention) -> None:
    case = attention("holes", dtype=torch.float32)
    before = [x.clone() for x in (*case.inputs, case.grad)]
    merged, _ = case.run(kernel, [0, 19])
    lse, output = merged.lse.clone(), merged.output.clone()
    case.back(kernel, [0, 19], merged)
    after = (*case.inputs, case.grad)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert torch.equal(lse, merged.lse)
    assert torch.equal(output, merged.output)


def test_the_reference_keeps_scores_within_its_bytes(attention, error) -> None:
    case = attention("holes", batch=3, heads=(6, 3), tokens=(50, 40), dtype=torch.float32)
    sizes = []
    for score_bytes in (1, 40 * 4 * 2 * 7, 40 * 4 * 2 * 50 * 2, 2**30):
        kernel = Reference(score_bytes=score_bytes)
        parts = list(kernel._parts(case.query, case.key))
        sizes.append(len(parts))
        assert error(case.run(kernel, [0, 40])[1], case.truth()[1]) < 4e-6
    assert sizes == [3 * 3 * 50, 3 * 3 * 8, 3 * 2, 1]


def test_cpu_flash_says_what_it_cannot(attention) -> None:
    case = attention()
    tile = Tile(Kind.FULL, (0, 19), (0, 19))
    assert "softcap" in CPU_FLASH.works(*case.inputs, tile, Scores(1.0, 2.0))
    nothing = case.query[:, :, :0]
    assert "no tokens" in CPU_FLASH.works(nothing, *case.inputs[1:], tile, case.scores)
    on_meta = [x.to("meta") for x in case.inputs]
    assert "meta" in CPU_FLASH.works(*on_meta, tile, case.scores)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_pickle(name: str) -> None:
    assert pickle.loads(pickle.dumps(KERNELS[name])) == KERNELS[name]
    assert KERNELS[name].name == name
