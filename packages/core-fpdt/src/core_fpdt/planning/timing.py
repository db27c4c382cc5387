"""How long a step takes, from what is computed and what is moved.

For every chunk the longer of both counts: transfers to the host run beside the arithmetic. The
exchange of heads and tokens between ranks stands in line with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core_fpdt.layer.traffic import bytes_per_token
from core_fpdt.planning.flops import (
    executed_flops,
    logged_flops,
    model_flops,
    pairs,
    projected,
    recomputed,
)
from core_fpdt.planning.job import Job

Bound = Literal["arithmetic", "link", "network"]


@dataclass(frozen=True)
class Phase:
    """Seconds of a part of the step, on one rank, over all layers.

    Args:
        name: ``forward``, ``backward``, ``loss`` or ``optimizer``.
        compute: of arithmetic alone.
        transfer: of moving chunks, between host and device, alone.
        exchange: of all-to-all between the ranks that share a sequence.
        gather: of collecting weights and spreading gradients, beside the arithmetic.
        seconds: what is left when all that runs at once does.
    """

    name: str
    compute: float
    transfer: float
    exchange: float
    gather: float
    seconds: float

    @property
    def bound(self) -> Bound:
        """What it waits for."""
        longest = max(self.compute, self.transfer, self.exchange, self.gather)
        if longest == self.compute:
            return "arithmetic"
        return "link" if longest == self.transfer else "network"


@dataclass(frozen=True)
class Times:
    """A step in seconds, and what that is of the devices' peak.

    Args:
        phases: its parts, one after the other.
        step: their sum.
        model_utilization: share of the peak by model FLOPs: causal, nothing that is computed twice.
        hardware_utilization: share of the peak by what is computed.
        logged_utilization: share of the peak as Megatron-DeepSpeed's log would count it; this one
            can be above 1.
    """

    phases: tuple[Phase, ...]
    step: float
    model_utilization: float
    hardware_utilization: float
    logged_utilization: float


def times(job: Job) -> Times:
    """Predict the seconds of a step; what other sequences do at the same time costs nothing."""
    phases = (_layers(job, backward=False), _loss(job), _layers(job, backward=True), _update(job))
    step = sum(phase.seconds for phase in phases)
    peak = step * job.sharing * job.hardware.flops
    return Times(
        phases,
        step,
        model_flops(job.shape, job.sequence) / peak,
        executed_flops(job) / peak,
        logged_flops(job.shape, job.sequence) / peak,
    )


def smallest_chunk(job: Job, *, backward: bool) -> float:
    """Tokens of a chunk from which on its arithmetic hides its transfers.

    Per token that is streamed: keys and values against ``4 * c * h * d`` FLOP forwards, what
    :func:`~core_fpdt.layer.traffic.bytes_per_token` says against ``10 * c * h * d`` backwards.
    """
    shape, device = job.shape, job.hardware
    if backward:
        heads = shape.heads, shape.key_heads, shape.head_dim
        moved = bytes_per_token(job.order, *heads, job.element)
        per_token = 10 * shape.query_width / (device.backward * device.flops)
    else:
        moved = 2 * shape.key_width * job.element
        per_token = 4 * shape.query_width / (device.forward * device.flops)
    return moved / device.own_link / per_token


def _layers(job: Job, *, backward: bool) -> Phase:
    compute = transfer = together = 0.0
    for window, count in job.shape.window_counts.items():
        for begin in range(0, job.sequence, job.chunk):
            one, other = _chunk(job, begin, window, backward)
            compute += count * one
            transfer += count * other
            together += count * max(one, other)
    exchange = job.shape.layers * _exchanged(job, backward) / _between(job, job.sharing)
    gather = _gathered(job, backward) / _between(job, job.gpus)
    seconds = max(together + exchange, gather)
    return Phase(
        "backward" if backward else "forward", compute, transfer, exchange, gather, seconds
    )


def _chunk(job: Job, begin: int, window: int, backward: bool) -> tuple[float, float]:
    """Seconds of arithmetic and of transfers of one chunk of one layer."""
    end = min(begin + job.chunk, job.sequence)
    tokens = (end - begin) / job.sharing
    reach = max(0, begin - window + 1) if window else 0
    earlier = (begin - reach // job.chunk * job.chunk) * (begin > 0)
    seen = 4 * (pairs(end, window) - pairs(begin, window)) * job.query_width
    compute = _attended(job, begin, seen, backward) + _weighted(job, tokens, backward)
    if job.offload == "none":
        return compute, 0.0
    return compute, _moved(job, begin, end, earlier, backward) / job.hardware.own_link


def _attended(job: Job, begin: int, seen: float, backward: bool) -> float:
    peak, forward = job.hardware.flops, job.hardware.forward
    if not backward:
        return seen / (peak * forward)
    again = seen / (peak * forward) if begin < recomputed(job) else 0.0
    return again + 2.5 * seen / (peak * job.hardware.backward)


def _weighted(job: Job, tokens: float, backward: bool) -> float:
    """Products with weights, and passes over memory of everything between them."""
    shape, device = job.shape, job.hardware
    weights = 2.0 * shape.active_parameters * (3 if backward else 1)
    weights += 2.0 * projected(job) if backward else 0.0
    # Norms, rotations, gates and additions read and write each width about so often.
    inner = 3 * shape.matrices * shape.intermediate * shape.active
    passes = (12 * shape.hidden + 4 * shape.query_width + inner) * (3 if backward else 1)
    return tokens * (
        weights / (device.flops * device.matmul) + passes * job.element / device.bandwidth
    )


def _moved(job: Job, begin: int, end: int, earlier: int, backward: bool) -> float:
    """Bytes over the link for one chunk of one layer."""
    tokens, b = end - begin, job.element
    keys, queries = 2 * job.key_width, job.query_width
    inputs = tokens / job.sharing * job.shape.hidden * b
    kept = tokens * (queries * b + 4 * queries / job.shape.head_dim)
    outputs = kept if begin >= recomputed(job) else 0.0
    if not backward:
        return inputs + outputs + tokens * keys * b + earlier * keys * b
    again = 0.0 if job.settings.keep_keys else inputs + tokens * keys * b
    if job.order == "query":
        return again + inputs + outputs + (earlier + tokens) * keys * (b + 8)
    streamed = queries * (3 * b + 8) + 4 * queries / job.shape.head_dim
    # Queries and gradients of outputs are put down first; the inputs come twice.
    return again + 2 * inputs + outputs + tokens * 2 * queries * b + (earlier + tokens) * streamed


def _exchanged(job: Job, backward: bool) -> float:
    """Bytes that one rank sends to the others, for one layer."""
    if job.sharing == 1:
        return 0.0
    inputs = job.query_width + 2 * job.key_width
    widths = inputs + job.query_width
    if backward:
        widths = 2 * widths + (0 if job.settings.keep_keys else inputs)
    return job.sequence * widths * job.element * (job.sharing - 1) / job.sharing


def _gathered(job: Job, backward: bool) -> float:
    """Bytes of weights that one rank receives, and of gradients that it sends."""
    share = (job.gpus - 1) / job.gpus
    weights = job.shape.parameters * job.element * share
    return 3 * weights if backward else weights


def _between(job: Job, ranks: int) -> float:
    return job.hardware.peer if ranks <= job.hardware.node else job.hardware.network


def _loss(job: Job) -> Phase:
    # Logits, and both gradients, which are made in the forward pass.
    flops = 6.0 * job.shape.head_parameters * job.local
    seconds = flops / (job.hardware.flops * job.hardware.matmul)
    return Phase("loss", seconds, 0.0, 0.0, 0.0, seconds)


def _update(job: Job) -> Phase:
    """Adam reads and writes 7 numbers a weight; on the host, weights and gradients travel."""
    own = job.shape.parameters / job.gpus
    if job.states == "none":
        return Phase("optimizer", 0.0, 0.0, 0.0, 0.0, 0.0)
    if job.states == "host":
        seconds = own * 2 * job.element / job.hardware.own_link
        return Phase("optimizer", 0.0, seconds, 0.0, 0.0, seconds)
    seconds = own * 7 * 4 / job.hardware.bandwidth
    return Phase("optimizer", seconds, 0.0, 0.0, 0.0, seconds)
