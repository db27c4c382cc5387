"""Codes come back from every layout, and lie where other programs look for them."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from core.errors import ModelError
from core_fp6.layouts import dense, execution, natural, tcfpx
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.packed import quantize
from core_fp6.weights.scaling import Scheme


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, shape, generator=generator, dtype=torch.uint8)


@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 700),
    experts=st.integers(0, 2),
    fmt=st.sampled_from([E3M2, E2M3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_planes_hold_the_codes(rows, columns, experts, fmt, seed):
    codes = random_codes(*[2] * experts, rows, columns, seed=seed)
    low, high = natural.pack(codes)
    assert (low.shape[-1], high.shape[-1]) == natural.planes_shape(columns)
    assert torch.equal(natural.unpack(low, high, columns), codes)
    low, high = execution.pack(codes, fmt)
    assert (low.shape[-1], high.shape[-1]) == execution.planes_shape(columns)
    assert torch.equal(execution.unpack(low, high, columns, fmt), codes)


def test_natural_planes_can_be_read_in_five_lines_of_numpy():
    codes = random_codes(3, 64)
    low, high = (plane.numpy() for plane in natural.pack(codes))
    for n in range(3):
        for k in range(64):
            lower = low[n, k // 2] >> 4 * (k % 2) & 15
            upper = high[n, k // 4] >> 2 * (k % 4) & 3
            assert lower | upper << 4 == codes[n, k]


def test_natural_planes_are_cut_at_every_fourth_column():
    codes = random_codes(2, 64)
    low, high = natural.pack(codes)
    for k in range(0, 64, 4):
        part = natural.unpack(low[:, k // 2 :], high[:, k // 4 :], 64 - k)
        assert torch.equal(part, codes[:, k:])


@pytest.mark.parametrize("fmt", [E3M2, E2M3], ids=lambda f: f.name)
def test_parts_of_a_block_are_unpacked_by_one_mask_and_one_shift(fmt):
    codes = random_codes(1, 256)
    low, high = execution.pack(codes, fmt)
    for part, (sign, top) in enumerate(execution.UPPER[fmt]):
        nibble = low[0, 64 * (part % 2) :][:64] >> 4 * (part // 2) & 15
        upper = (high[0] >> sign & 1) << 5 | (high[0] >> top & 1) << 4
        wanted = execution.to_places(codes[0, 64 * part :][:64])
        assert torch.equal(nibble | upper, wanted)


@given(st.integers(1, 300), st.integers(1, 4), st.sampled_from([E3M2, E2M3]), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_repacking_changes_no_value(columns, rows, fmt, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed = quantize(weight, Scheme(fmt, 64))
    there = packed.to("execution")
    back = there.to("natural")
    assert torch.equal(there.dequantize(), packed.dequantize())
    assert torch.equal(back.low, packed.low)
    assert torch.equal(back.high, packed.high)


def test_tcfpx_places_every_code_where_its_kernels_look():
    rows, columns = 128, 64
    codes = random_codes(rows, columns)
    data = tcfpx.pack(codes)
    high, low = data[: rows * columns // 4], data[rows * columns // 4 :]
    for r in range(rows):
        for k in range(columns):
            tile = (r // 64) * (columns // 16) + k // 16
            b, c, d = (r // 32) % 2, (r // 16) % 2, (r // 8) % 2
            g, j = (k // 8) % 2, k % 2
            lane = (r % 8) * 4 + (k % 8) // 2
            p = ((tile * 4 + 2 * b + c) * 32 + lane) * 8 + 4 * j + 2 * (1 - d) + g
            assert low[p // 2] >> (4 if p % 2 == 0 else 0) & 15 == codes[r, k] & 15
            p = ((tile * 2 + b) * 32 + lane) * 16 + 8 * j + 4 * (1 - d) + 2 * c + g
            assert high[p // 4] >> 6 - 2 * (p % 4) & 3 == codes[r, k] >> 4
    assert torch.equal(tcfpx.unpack(data, rows, columns), codes)


@pytest.mark.parametrize("shape", [(63, 64), (64, 32), (100, 100)])
def test_tcfpx_refuses_what_its_tiles_do_not_cover(shape):
    with pytest.raises(ModelError, match="rows go by 64"):
        tcfpx.pack(torch.zeros(shape, dtype=torch.uint8))


def test_tcfpx_refuses_bytes_of_another_layer():
    with pytest.raises(ModelError, match="3072 bytes instead of 6144"):
        tcfpx.unpack(tcfpx.pack(random_codes(64, 64)), 128, 64)


@pytest.mark.parametrize("first", ["high", "low"])
def test_four_codes_lie_in_three_bytes(first):
    codes = random_codes(5, 64)
    data = dense.pack(codes, first)
    order = "big" if first == "high" else "little"
    for row in range(5):
        for four in range(16):
            word = int.from_bytes(bytes(data[row, 3 * four : 3 * four + 3].tolist()), order)
            shifts = (18, 12, 6, 0) if first == "high" else (0, 6, 12, 18)
            assert [word >> s & 63 for s in shifts] == codes[row, 4 * four :][:4].tolist()
    assert torch.equal(dense.unpack(data, first), codes)
    with pytest.raises(ModelError, match="65 bytes"):
        dense.unpack(torch.zeros(65, dtype=torch.uint8), first)
    with pytest.raises(ModelError, match="3 columns"):
        dense.pack(codes[:, :3], first)
