"""How fast a conversion will be, from reading the first blocks of it."""

from __future__ import annotations

import time

import numpy as np

from core_ucp.execution.digest import digest_of
from core_ucp.execution.gathering import item_type, read_pieces
from core_ucp.execution.planning import Plan

SAMPLE = 64 * 2**20
"""Bytes that are read at most."""


def bytes_per_second(plan: Plan) -> float:
    """Speed at which one thread reads and digests the source; the target's disk may be slower.

    Returns:
        bytes per second, or infinity for a plan without tensors.
    """
    done, started = 0, time.perf_counter()
    for copies in plan.copies:
        itemsize = copies.source.stored.itemsize
        starts, sizes = copies.blocks.boxes.start.tolist(), copies.blocks.boxes.size.tolist()
        for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            parts = copies.parts.take(np.arange(copies.first[row], copies.first[row + 1]))
            block = np.empty(size, item_type(itemsize))
            done += read_pieces(plan.view.files, parts, start, block)
            digest_of(block.reshape(-1).view(np.uint8))
            if done >= SAMPLE:
                return done / (time.perf_counter() - started)
    return done / (time.perf_counter() - started) if done else float("inf")
