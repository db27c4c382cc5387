"""A plan as tables."""

from __future__ import annotations

from collections.abc import Iterator

import click

from core.cli.table import echo_table
from core_fpdt.planning.memory import Parts, kept_per_token
from core_fpdt.planning.plan import Plan
from core_fpdt.planning.timing import smallest_chunk
from core_fpdt.planning.units import show_bytes, show_tokens


def print_plan(found: Plan) -> None:
    """Print what a step takes, how long it takes, and what would help."""
    echo_table(("", found.job.shape.name), _facts(found))
    click.echo("")
    job, taken = found.job, found.memory
    limit = job.hardware.memory
    title = f"PART OF A DEVICE, {taken.moment}"
    echo_table(("BYTES", title), _parts(taken.device, taken.device_bytes, limit))
    click.echo("")
    if taken.host:
        host = _parts(taken.host, taken.host_bytes, found.host_limit)
        echo_table(("BYTES", "PART OF THE HOST, each rank"), host)
        click.echo("")
    head = ("PHASE", "SECONDS", "ARITHMETIC", "LINK", "EXCHANGE", "WEIGHTS", "WAITS FOR")
    echo_table(head, _phases(found))
    for line in found.advice:
        click.echo(f"advice: {line}")


def _facts(found: Plan) -> Iterator[tuple[str, str]]:
    job, needed = found.job, found.times
    groups = job.gpus // job.sharing
    several = f", {groups} sequences at once" if groups > 1 else ""
    yield "fits", "yes" if found.fits else "NO"
    yield "longest", f"{show_tokens(found.longest)} tokens, then the {found.limit} is full"
    yield "", f"{show_tokens(found.longest_relaxed)} tokens with as little kept as possible"
    yield "sequence", f"{show_tokens(job.sequence)} tokens by {job.sharing} ranks{several}"
    yield "devices", f"{job.gpus} {job.hardware.name}"
    yield "chunks", f"{job.chunks:,} of {show_tokens(job.chunk)} tokens, {job.order} order"
    yield "kept", f"{_kept(found)}; chunks wait in: {_PLACES[job.offload]}"
    yield "states", f"weights, gradients and optimizer: {_STATES[job.states]}"
    rate = job.sequence * groups / needed.step
    yield "step", f"{needed.step:,.3g} s, {rate:,.4g} tokens/s"
    yield "utilization", f"{needed.model_utilization:.1%} by model FLOPs (causal, nothing twice)"
    yield "", f"{needed.hardware_utilization:.1%} by what is computed"
    yield "", f"{needed.logged_utilization:.1%} as Megatron-DeepSpeed logs it (square, 4 forwards)"
    if job.offload != "none":
        least = [smallest_chunk(job, backward=way) for way in (False, True)]
        text = f"{least[0]:,.0f} tokens forwards, {least[1]:,.0f} backwards"
        yield "hides transfers", f"from chunks of {text}"


def _kept(found: Plan) -> str:
    settings = found.job.settings
    what = ["layer inputs"]
    if settings.keep_output:
        share = "" if settings.keep_output == 1 else f" of the last {settings.keep_output:.1%}"
        what.append(f"attention outputs{share}")
    if settings.keep_keys:
        what.append("keys and values")
    per_token = show_bytes(found.job.shape.layers * kept_per_token(found.job))
    return f"{', '.join(what)}: {per_token} a token"


def _parts(parts: Parts, total: float, limit: float) -> Iterator[tuple[str, str]]:
    for part, size in sorted(parts.items(), key=lambda item: -item[1]):
        yield show_bytes(size), part
    yield show_bytes(total), f"in all, of {show_bytes(limit) if limit < float('inf') else 'any'}"


def _phases(found: Plan) -> Iterator[tuple[str, ...]]:
    for phase in found.times.phases:
        parts = (phase.seconds, phase.compute, phase.transfer, phase.exchange, phase.gather)
        yield (phase.name, *(f"{seconds:,.4g}" for seconds in parts), phase.bound)


_PLACES = {"none": "the device", "host": "host memory", "file": "files"}
_STATES = {"device": "on the devices", "host": "on the host", "none": "no optimizer"}
