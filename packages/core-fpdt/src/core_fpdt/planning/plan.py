"""A plan: what a training step will take, how long, whether it fits, and what would help."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from core_fpdt.planning.advice import advice
from core_fpdt.planning.fitting import fits, host_limit, longest, relaxed, with_settings
from core_fpdt.planning.hardware import Hardware, hardware as known_hardware
from core_fpdt.planning.job import Job, States
from core_fpdt.planning.memory import Memory, kept_per_token, memory
from core_fpdt.planning.shape import ModelShape, from_config, from_name
from core_fpdt.planning.timing import Times, smallest_chunk, times
from core_fpdt.settings import FPDTSettings

Limit = Literal["device", "host"]


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
        return fits(self.job, self.memory)

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
    for job in relaxed(found.job):
        if fits(job):
            return of_job(job)
        tried.append(job)
    return of_job(max(tried, key=longest))


def of_job(job: Job) -> Plan:
    """Plan a job."""
    taken, most = memory(job), longest(job)
    further = max(longest(with_settings(each, keep_output=0.0)) for each in relaxed(job))
    longer = replace(job, sequence=most + job.chunk)
    limit: Limit = "host" if memory(longer).host_bytes > host_limit(longer) else "device"
    told = tuple(advice(job, taken, most))
    room = host_limit(job)
    return Plan(job, taken, times(job), room, most, max(most, further), limit, told)


def _shape(model: ModelShape | str | Any) -> ModelShape:
    if isinstance(model, ModelShape):
        return model
    return from_name(model) if isinstance(model, str) else from_config(model)
