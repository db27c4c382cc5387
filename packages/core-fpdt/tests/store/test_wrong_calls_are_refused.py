from __future__ import annotations

import pytest
import torch

from core.errors import CoreError
from core_fpdt.store.contract import Store

CHUNK = torch.ones(2, 4, 3)


def test_a_chunk_of_another_shape(store: Store) -> None:
    lane = store.lane("keys", (0, 4, 6), dim=1)
    lane.put(0, CHUNK)
    with pytest.raises(
        ValueError, match=r"chunk 1 of keys has shape \(2, 4, 3\), its place \(2, 2, 3\)"
    ):
        lane.put(1, CHUNK)
    with pytest.raises(IndexError, match=r"keys has no chunks \[2, 3\)"):
        lane.put(2, CHUNK)


def test_edges_that_do_not_grow(store: Store) -> None:
    for edges in ((0, 4, 4), (1, 4), ()):
        with pytest.raises(ValueError, match="the edges of keys must begin with 0 and grow"):
            store.lane("keys", edges, dim=1)


def test_a_chunk_that_is_out(store: Store) -> None:
    lane = store.lane("keys", (0, 4), dim=1)
    lane.put(0, CHUNK)
    lane.get(0)
    lane.get(0)
    lane.done(0)
    for change in (lane.put, lane.add):
        with pytest.raises(ValueError, match="chunk 0 of keys is out"):
            change(0, CHUNK)
    lane.done(0)
    lane.done(0)
    lane.put(0, 2 * CHUNK)
    assert torch.equal(lane.get(0), 2 * CHUNK)


def test_a_closed_lane(store: Store) -> None:
    lane = store.lane("keys", (0, 4), dim=1)
    lane.put(0, CHUNK)
    lane.close()
    lane.done(0)
    lane.drop(0)
    lane.prefetch(0)
    with pytest.raises(KeyError):
        lane.get(0)
    with pytest.raises(CoreError, match="the lane keys is closed"):
        lane.put(0, CHUNK)


def test_a_range_of_a_lane_that_is_not_whole(store: Store) -> None:
    lane = store.lane("inputs", (0, 4, 8), dim=1, whole=False)
    lane.put(0, CHUNK)
    lane.put(1, CHUNK)
    if not lane.whole:
        with pytest.raises(ValueError, match=r"inputs gives one chunk at a time, not \[0, 2\)"):
            lane.get(0, 2)
    else:
        assert lane.get(0, 2).shape == (2, 8, 3)
    assert torch.equal(lane.get(0, 1), CHUNK)


def test_a_dropped_chunk_is_zero_again_to_whatever_is_added(store: Store) -> None:
    lane = store.lane("gradients", (0, 4, 8), dim=1)
    lane.put(0, CHUNK)
    lane.put(1, 5 * CHUNK)
    lane.drop(1)
    if lane.whole:
        lane.add(0, torch.ones(2, 8, 3), 2)
    else:
        lane.add(0, CHUNK)
        lane.add(1, CHUNK)
    assert torch.equal(lane.get(0), 2 * CHUNK)
    assert torch.equal(lane.get(1), CHUNK)
