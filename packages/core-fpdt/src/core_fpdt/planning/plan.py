"""A plan: what a training step will take, how long, whether it fits, and what would help."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from core.errors import SettingsError
from core_fpdt.planning.hardware import GIB, Hardware, hardware as known_hardware
from core_fpdt.planning.job import Job, States
from core_fpdt.planning.memory import Memory, kept_per_token, memory
from core_fpdt.planning.shape import ModelShape, from_config, from_name
from core_fpdt.planning.timing import Times, smallest_chunk, times
from core_fpdt.planning.units import show_bytes, show_tokens
from core_fpdt.settings import FPDTSettings

Limit = Literal["device", "host"]

_MOST_CHUNKS = 2**24
_STEPS = 2**-10


@dataclass(frozen=True)
class Plan:
    """What is known of a training step before anything is allocated.

    Args:
        job: what was planned.
        memory: bytes by part.
        times: seconds by phase.
        host_limit: bytes that a rank may take outside of its device; infinite for files.
        longest: most tokens of a sequence that fit, in whole chunks; 0 if not one chunk does.
        longest_relaxed: most tokens that fit when as little as possible is kept.
        limit: what a longer sequence would not fit into.
        advice: what helps, one sentence each.
    """

    job: Job
    memory: Memory
    times: Times
    host_limit: float
    longest: int
    longest_relaxed: int
    limit: Limit
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether device and host have room."""
        return _fits(self.job, self.memory)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values: bytes, seconds, tokens."""
        job, device = self.job, self.job.hardware
        settings = job.settings
        return {
            "model": job.shape.name,
            "parameters": job.shape.parameters,
            "device": device.name,
            "sequence": job.sequence,
            "gpus": job.gpus,
            "ranks": job.sharing,
            "chunk_tokens": job.chunk,
            "chunks": job.chunks,
            "order": job.order,
            "offload": job.offload,
            "keep_output": settings.keep_output,
            "keep_keys": settings.keep_keys,
            "states": job.states,
            "fits": self.fits,
            "limit": self.limit,
            "longest": self.longest,
            "longest_relaxed": self.longest_relaxed,
            "moment": self.memory.moment,
            "device_bytes": self.memory.device_bytes,
            "device_limit": device.memory,
            "device_parts": dict(self.memory.device),
            "host_bytes": self.memory.host_bytes,
            "host_limit": self.host_limit,
            "host_parts": dict(self.memory.host),
            "host_bytes_per_node": self.memory.host_bytes * job.ranks_of_node,
            "kept_bytes_per_token_of_layer": kept_per_token(job),
            "phases": {
                phase.name: {
                    "seconds": phase.seconds,
                    "compute": phase.compute,
                    "transfer": phase.transfer,
                    "exchange": phase.exchange,
                    "gather": phase.gather,
                    "bound": phase.bound,
                }
                for phase in self.times.phases
            },
            "smallest_chunk": {
                "forward": smallest_chunk(job, backward=False),
                "backward": smallest_chunk(job, backward=True),
            },
            "step_seconds": self.times.step,
            "model_flops_utilization": self.times.model_utilization,
            "hardware_flops_utilization": self.times.hardware_utilization,
            "megatron_log_utilization": self.times.logged_utilization,
            "advice": list(self.advice),
        }


def plan(
    model: ModelShape | str | Any,
    sequence: int,
    gpus: int = 1,
    hardware: Hardware | str = "a100",
    settings: FPDTSettings | None = None,
    *,
    ranks: int = 0,
    element: int = 2,
    states: States = "device",
) -> Plan:
    """Plan a training step with the settings as they are; nothing is allocated.

    Args:
        model: a shape, the name of a known one, a folder, or a configuration of transformers.
        sequence: tokens of a sequence.
        gpus: devices in all.
        hardware: the devices, or the name of known ones.
        settings: how layers are run.
        ranks: devices that share a sequence; as many as there are heads for, if 0.
        element: bytes of an element while computing.
        states: where weights, gradients and optimizer are; see :class:`Job`.

    Raises:
        ModelError: for an unknown model.
        SettingsError: for values that do not fit together.

    Example:
        >>> found = plan("llama-3-8b", 2**20, gpus=8, hardware="h100")
        >>> found.fits, found.limit
        (True, 'host')
    """
    job = Job(
        shape=_shape(model),
        hardware=known_hardware(hardware) if isinstance(hardware, str) else hardware,
        sequence=sequence,
        gpus=gpus,
        ranks=ranks,
        settings=settings or FPDTSettings(),
        element=element,
        states=states,
    )
    return of_job(job)


def fitted(found: Plan) -> Plan:
    """The plan that computes least twice among those that fit, when others keep less.

    Keys and values go first, as they are cheap to project again; then attention outputs from the
    front of the sequence, as early rows are cheap to compute again (keep_output); then weights and
    optimizer go to the host. Where nothing fits, the plan that allows the longest sequence.
    """
    tried: list[Job] = []
    for job in _relaxed(found.job):
        if _fits(job):
            return of_job(job)
        tried.append(job)
    return of_job(max(tried, key=_longest))


def of_job(job: Job) -> Plan:
    """Plan a job."""
    taken, needed = memory(job), times(job)
    longest = _longest(job)
    relaxed = max(_longest(_with(each, keep_output=0.0)) for each in _relaxed(job))
    longer = replace(job, sequence=longest + job.chunk)
    limit: Limit = "host" if memory(longer).host_bytes > _host_limit(longer) else "device"
    made = Plan(job, taken, needed, _host_limit(job), longest, max(longest, relaxed), limit, ())
    return replace(made, advice=tuple(_advice(made)))


def _shape(model: ModelShape | str | Any) -> ModelShape:
    if isinstance(model, ModelShape):
        return model
    return from_name(model) if isinstance(model, str) else from_config(model)


def _host_limit(job: Job) -> float:
    if job.offload == "file":
        return math.inf
    if job.settings.host_memory:
        return job.settings.host_memory * GIB
    return job.hardware.host * job.hardware.host_share / job.ranks_of_node


def _fits(job: Job, taken: Memory | None = None) -> bool:
    taken = taken or memory(job)
    return taken.device_bytes <= job.hardware.memory and taken.host_bytes <= _host_limit(job)


def _longest(job: Job) -> int:
    """Most tokens that fit, in whole chunks: what is taken only grows with the sequence."""
    chunk = job.settings.chunk_tokens or replace(job, sequence=2**40).chunk

    def fits(count: int) -> bool:
        return _fits(replace(job, sequence=count * chunk))

    low, high = 0, 1
    while high <= _MOST_CHUNKS and high * chunk <= 2**40 and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * chunk


def _relaxed(job: Job) -> Iterator[Job]:
    """The job as it is, and with less and less kept on the host and on the device."""
    states: list[States] = [job.states]
    if job.states == "device":
        states.append("host")
    for where in states:
        for keys in sorted({job.settings.keep_keys, False}, reverse=True):
            yield _with(replace(job, states=where), keep_keys=keys)
        less = _with(replace(job, states=where), keep_keys=False)
        yield _with(less, keep_output=_affordable_output(less))


def _affordable_output(job: Job) -> float:
    """The largest ``keep_output``, up to the one that is set, that the host has room for."""
    most = job.settings.keep_output
    nothing = memory(_with(job, keep_output=0.0)).host_bytes
    everything = memory(_with(job, keep_output=1.0)).host_bytes
    room = _host_limit(job)
    if everything <= room:
        return most
    share = (room - nothing) / (everything - nothing)
    return max(0.0, min(most, math.floor(share / _STEPS) * _STEPS))


def _with(job: Job, **changes: Any) -> Job:
    return replace(job, settings=replace(job.settings, **changes))


def _advice(found: Plan) -> Iterator[str]:
    if not found.fits:
        yield from _room(found)
    job = found.job
    if job.offload == "none" or job.chunks == 1:
        return
    needed = max(smallest_chunk(job, backward=way) for way in (False, True))
    if job.chunk < needed:
        size = 2 ** math.ceil(math.log2(needed))
        yield (
            f"transfers are not hidden: chunk_tokens = {size} would do"
            f" (from {needed:,.0f} on arithmetic takes longer)"
        )


def _room(found: Plan) -> Iterator[str]:
    """What makes a plan fit, each by itself; else more devices."""
    job = found.job
    lacking = found.memory.device_bytes - job.hardware.memory
    if lacking > 0:
        yield f"each device lacks {show_bytes(lacking)} ({found.memory.moment})"
    lacking = found.memory.host_bytes - found.host_limit
    if lacking > 0:
        yield f"the host lacks {show_bytes(lacking * job.ranks_of_node)} per node"
    helpful = [text for text, other in _alternatives(job) if _fits(other)]
    yield from (f"{text} fits" for text in helpful)
    if not helpful:
        yield from _more_devices(job)
    if found.longest:
        yield f"{show_tokens(found.longest)} tokens fit as it is"


def _alternatives(job: Job) -> Iterator[tuple[str, Job]]:
    settings = job.settings
    if job.offload == "none":
        yield 'offload = "host"', _with(job, offload="host")
    if job.offload == "host":
        yield 'offload = "file"', _with(job, offload="file")
    if settings.keep_keys:
        yield "keep_keys = false", _with(job, keep_keys=False)
    share = _affordable_output(job)
    if share < settings.keep_output:
        yield f"keep_output = {share:.3g}", _with(job, keep_output=share)
        less = _with(job, keep_keys=False)
        share = _affordable_output(less)
        both = f"keep_keys = false with keep_output = {share:.3g}"
        yield both, _with(less, keep_output=share)
    if job.states == "device":
        yield "keeping weights and optimizer on the host", replace(job, states="host")
    chunk = job.chunk // 2
    while chunk >= 1024:
        smaller = _with(job, chunk_tokens=chunk)
        if _fits(smaller):
            yield f"chunk_tokens = {chunk}", smaller
            break
        chunk //= 2
    logits = settings.loss_chunk_bytes // 8
    if logits >= 2**20:
        yield f"loss_chunk_bytes = {logits}", _with(job, loss_chunk_bytes=logits)


def _more_devices(job: Job) -> Iterator[str]:
    gpus = job.gpus
    for _ in range(10):
        gpus *= 2
        try:
            more = replace(job, gpus=gpus, ranks=0)
        except SettingsError:
            return
        policy = next((each for each in _relaxed(more) if _fits(each)), None)
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
