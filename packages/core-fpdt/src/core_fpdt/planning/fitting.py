"""What fits, and what would when less is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from core_fpdt.planning.hardware import GIB
from core_fpdt.planning.job import Job, States
from core_fpdt.planning.memory import Memory, memory

_MOST_CHUNKS = 2**24
_STEPS = 2**-10


def host_limit(job: Job) -> float:
    """Bytes that a rank may take outside of its device; infinite for files."""
    if job.offload == "file":
        return math.inf
    if job.settings.host_memory:
        return job.settings.host_memory * GIB
    return job.hardware.host * job.hardware.host_share / job.ranks_of_node


def fits(job: Job, taken: Memory | None = None) -> bool:
    """Whether device and host have room; ``taken`` is its memory, where that is known."""
    taken = taken or memory(job)
    return taken.device_bytes <= job.hardware.memory and taken.host_bytes <= host_limit(job)


def longest(job: Job) -> int:
    """Most tokens that fit, in whole chunks: what is taken only grows with the sequence."""
    chunk = job.settings.chunk_tokens or replace(job, sequence=2**40).chunk

    def room(count: int) -> bool:
        return fits(replace(job, sequence=count * chunk))

    low, high = 0, 1
    while high <= _MOST_CHUNKS and high * chunk <= 2**40 and room(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if room(middle) else (low, middle)
    return low * chunk


def relaxed(job: Job) -> Iterator[Job]:
    """The job as it is, and with less and less kept on the host and on the device."""
    states: list[States] = [job.states]
    if job.states == "device":
        states.append("host")
    for where in states:
        for keys in sorted({job.settings.keep_keys, False}, reverse=True):
            yield with_settings(replace(job, states=where), keep_keys=keys)
        less = with_settings(replace(job, states=where), keep_keys=False)
        yield with_settings(less, keep_output=affordable_output(less))


def affordable_output(job: Job) -> float:
    """The largest ``keep_output``, up to the one that is set, that the host has room for."""
    most = job.settings.keep_output
    nothing = memory(with_settings(job, keep_output=0.0)).host_bytes
    everything = memory(with_settings(job, keep_output=1.0)).host_bytes
    room = host_limit(job)
    if everything <= room or everything == nothing:
        return most
    share = (room - nothing) / (everything - nothing)
    return max(0.0, min(most, math.floor(share / _STEPS) * _STEPS))


def with_settings(job: Job, **changes: Any) -> Job:
    """The job with other settings."""
    return replace(job, settings=replace(job.settings, **changes))
