"""Every kernel compiles for devices that are not there, and keeps its numbers in registers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core_splitfuse.attention.dense import Rule

triton = pytest.importorskip("triton")
if triton.knobs.nvidia.nvdisasm is None or not Path(triton.knobs.nvidia.nvdisasm.path).is_file():
    pytest.skip("this Triton comes without NVIDIA's disassembler", allow_module_level=True)

from core_splitfuse.attention.gpu import static  # noqa: E402
from core_splitfuse.attention.gpu.rotation import Rotation  # noqa: E402
from core_splitfuse.attention.gpu.tiles import Heads, for_chunks, for_decodes  # noqa: E402

DEVICES = pytest.mark.parametrize(
    ("capability", "device"),
    [pytest.param(80, static.AMPERE, marks=pytest.mark.nightly), (90, static.HOPPER)],
    ids=["sm_80", "sm_90"],
)
PLAIN = Rule(0.1)
EVERYTHING = Rule(0.1, window=128, softcap=30.0, sinks=torch.ones(8))
ONE = torch.ones(1, dtype=torch.int32)
TURNED = Rotation(torch.ones(1, 64), ONE, torch.ones(1))
BY_HEAD = Rotation(torch.ones(1, 48), ONE, torch.ones(1), torch.ones(1, 1), interleaved=True)


def heads_of(dtype: torch.dtype, dims: tuple[int, int] = (128, 128), **kinds: int) -> Heads:
    return Heads(
        **{"query": 8, "key": 2, **kinds}, dim=dims[0], value_dim=dims[1], itemsize=dtype.itemsize
    )


PLAIN_CASES = [
    (capability, device, dtype, tile_for)
    for capability, device in ((90, static.HOPPER), (80, static.AMPERE))
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for tile_for in (for_decodes, for_chunks)
]
OFTEN = (PLAIN_CASES[0], PLAIN_CASES[1], PLAIN_CASES[5], PLAIN_CASES[7])


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "tile_for"),
    [
        pytest.param(*case, marks=() if case in OFTEN else pytest.mark.nightly)
        for case in PLAIN_CASES
    ],
)
def test_plain_attention(capability, device, dtype, tile_for) -> None:
    heads = heads_of(dtype)
    tile = tile_for(heads, device)
    cost = static.attending(heads, tile, dtype, PLAIN, capability=capability)
    assert cost.spills == 0
    assert cost.copies > 0, "keys are not loaded ahead"
    assert cost.shared_memory <= device.shared_memory
    assert (cost.products > 0) is (dtype != torch.float32)


@DEVICES
@pytest.mark.parametrize(
    "tile_for", [for_decodes, pytest.param(for_chunks, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize(
    ("rule", "rotation"),
    [
        pytest.param(EVERYTHING, None, marks=pytest.mark.nightly),
        pytest.param(PLAIN, TURNED, marks=pytest.mark.nightly),
        (EVERYTHING, BY_HEAD),
    ],
)
def test_everything_at_once(capability, device, tile_for, rule, rotation) -> None:
    dtype = torch.bfloat16
    heads = heads_of(dtype)
    if rotation is BY_HEAD:
        heads = Heads(8, 2, 128, 128, 2, apart=True)
    tile = tile_for(heads, device)
    cost = static.attending(heads, tile, dtype, rule, rotation, capability=capability)
    assert cost.spills == 0
    assert cost.shared_memory <= device.shared_memory


@pytest.mark.nightly
@pytest.mark.parametrize("tile_for", [for_decodes, for_chunks])
@pytest.mark.parametrize("dims", [(24, 16), (64, 64), (192, 128), (256, 256), (512, 512)], ids=str)
@pytest.mark.parametrize("block_size", [16, 256])
def test_all_sizes_of_heads_and_blocks(tile_for, dims, block_size) -> None:
    dtype = torch.bfloat16
    heads = heads_of(dtype, dims)
    tile = tile_for(heads, static.HOPPER)
    cost = static.attending(heads, tile, dtype, PLAIN, block_size=block_size)
    assert cost.spills == 0
    assert cost.shared_memory <= static.HOPPER.shared_memory


@pytest.mark.nightly
@pytest.mark.parametrize(("query", "key"), [(1, 1), (48, 1), (28, 4), (100, 1)])
def test_all_groups(query: int, key: int) -> None:
    heads = heads_of(torch.bfloat16, query=query, key=key)
    for tile in (for_decodes(heads, static.HOPPER), for_chunks(heads, static.HOPPER)):
        assert 1 <= tile.heads <= tile.rows
        assert static.attending(heads, tile, torch.bfloat16, PLAIN).spills == 0


@pytest.mark.nightly
def test_tiles_fit_small_devices() -> None:
    device = static.Device(processors=20, shared_memory=101376)
    for dims in ((64, 64), (128, 128), (256, 256)):
        heads = heads_of(torch.bfloat16, dims)
        for tile in (for_decodes(heads, device), for_chunks(heads, device)):
            cost = static.attending(heads, tile, torch.bfloat16, PLAIN, capability=80)
            assert cost.shared_memory <= device.shared_memory


@DEVICES
def test_the_other_kernels(capability, device) -> None:
    dtype = torch.bfloat16
    heads = heads_of(dtype, (192, 128))
    for kernel in (static.merging, static.writing, static.copying):
        assert kernel(heads, dtype, capability).spills == 0
