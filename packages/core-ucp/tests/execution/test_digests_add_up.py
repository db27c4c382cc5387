"""The digest of a whole is the sum of the digests of its parts, and finds what has changed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings, strategies as st

from core_ucp.execution.digest import Digest, digest_of

SIZES = st.one_of(st.integers(0, 40), st.integers(4080, 4110), st.integers(8000, 300_000))


def noise(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def reference(data: bytes) -> Digest:
    """Word by word, as the definition says, with the coefficients of single words."""
    total = Digest()
    for begin in range(0, len(data), 8):
        total += digest_of(data[begin : begin + 8], begin)
    return total


@settings(deadline=None)
@given(size=SIZES, seed=st.integers(0, 99), places=st.lists(st.integers(0, 10**9), max_size=6))
def test_parts_add_up(size: int, seed: int, places: list[int]) -> None:
    data = noise(size, seed)
    edges = [0, *sorted(place % (size + 1) for place in places), size]
    parts = (digest_of(data[a:b], a) for a, b in pairwise(edges))
    assert sum(parts, Digest()) == digest_of(data)


@settings(deadline=None, max_examples=20)
@given(size=st.integers(0, 20_000), seed=st.integers(0, 9))
def test_blocks_are_words(size: int, seed: int) -> None:
    data = noise(size, seed)
    assert digest_of(data) == reference(data)


@settings(deadline=None)
@given(size=st.integers(1, 20_000), seed=st.integers(0, 9), data=st.data())
def test_every_flipped_byte_is_found(size: int, seed: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, size - 1))
    change = data.draw(st.integers(1, 255))
    before = bytearray(noise(size, seed))
    after = bytearray(before)
    after[place] ^= change
    assert digest_of(before) != digest_of(after)


def test_two_flipped_signs_and_exchanged_elements_are_found() -> None:
    values = np.arange(1, 5000, dtype=np.float32)
    whole = digest_of(values.tobytes())
    for first, second in [(1, 3), (1, 1025), (0, 1024), (5, 4000)]:
        flipped = values.copy()
        flipped[[first, second]] *= -1
        swapped = values.copy()
        swapped[[first, second]] = swapped[[second, first]]
        assert digest_of(flipped.tobytes()) != whole
        assert digest_of(swapped.tobytes()) != whole


def test_the_place_counts() -> None:
    assert digest_of(b"abc", 0) != digest_of(b"abc", 8)
    assert str(digest_of(b"")) == "0" * 32
