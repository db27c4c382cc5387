"""What would help: to make a plan fit, and to hide its transfers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from core.errors import SettingsError
from core_fpdt.planning.fitting import affordable_output, fits, host_limit, relaxed, with_settings
from core_fpdt.planning.job import Job
from core_fpdt.planning.memory import Memory
from core_fpdt.planning.timing import smallest_chunk
from core_fpdt.planning.units import show_bytes, show_tokens


def advice(job: Job, taken: Memory, most: int) -> Iterator[str]:
    """Sentences on what would help.

    Args:
        job: what is planned.
        taken: its memory.
        most: tokens that fit as it is.
    """
    if not fits(job, taken):
        yield from _room(job, taken, most)
    if job.offload == "none" or job.chunks == 1:
        return
    needed = max(smallest_chunk(job, backward=way) for way in (False, True))
    if job.chunk < needed:
        size = 2 ** math.ceil(math.log2(needed))
        yield (
            f"transfers are not hidden: chunk_tokens = {size} would do"
            f" (from {needed:,.0f} on arithmetic takes longer)"
        )


def _room(job: Job, taken: Memory, most: int) -> Iterator[str]:
    """What makes a plan fit, each by itself; else more devices."""
    lacking = taken.device_bytes - job.hardware.memory
    if lacking > 0:
        yield f"each device lacks {show_bytes(lacking)} ({taken.moment})"
    lacking = taken.host_bytes - host_limit(job)
    if lacking > 0:
        yield f"the host lacks {show_bytes(lacking * job.ranks_of_node)} per node"
    helpful = [text for text, other in _alternatives(job) if fits(other)]
    yield from (f"{text} fits" for text in helpful)
    if not helpful:
        yield from _more_devices(job)
    if most:
        yield f"{show_tokens(most)} tokens fit as it is"


def _alternatives(job: Job) -> Iterator[tuple[str, Job]]:
    settings = job.settings
    if job.offload == "none":
        yield 'offload = "host"', with_settings(job, offload="host")
    if job.offload == "host":
        yield 'offload = "file"', with_settings(job, offload="file")
    if settings.keep_keys:
        yield "keep_keys = false", with_settings(job, keep_keys=False)
    share = affordable_output(job)
    if share < settings.keep_output:
        yield f"keep_output = {share:.3g}", with_settings(job, keep_output=share)
        less = with_settings(job, keep_keys=False)
        share = affordable_output(less)
        both = f"keep_keys = false with keep_output = {share:.3g}"
        yield both, with_settings(less, keep_output=share)
    if job.states == "device":
        yield "keeping weights and optimizer on the host", replace(job, states="host")
    chunk = job.chunk // 2
    while chunk >= 1024:
        smaller = with_settings(job, chunk_tokens=chunk)
        if fits(smaller):
            yield f"chunk_tokens = {chunk}", smaller
            break
        chunk //= 2
    logits = settings.loss_chunk_bytes // 8
    if logits >= 2**20:
        yield f"loss_chunk_bytes = {logits}", with_settings(job, loss_chunk_bytes=logits)


def _more_devices(job: Job) -> Iterator[str]:
    gpus = job.gpus
    for _ in range(10):
        gpus *= 2
        try:
            more = replace(job, gpus=gpus, ranks=0)
        except SettingsError:
            return
        policy = next((each for each in relaxed(more) if fits(each)), None)
        if policy is not None:
            yield f"{gpus} devices have room{_told(job, policy)}"
            return


def _told(job: Job, policy: Job) -> str:
    changed = [
        f"{name} = {getattr(policy.settings, name):.3g}"
        for name in ("keep_keys", "keep_output")
        if getattr(policy.settings, name) != getattr(job.settings, name)
    ]
    changed += [f"states on the {policy.states}"] if policy.states != job.states else []
    return f", with {' and '.join(changed)}" if changed else ""
