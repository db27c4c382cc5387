"""What ``core doctor`` and ``core bench`` say of six-bit weights on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import nn

from core import Reading
from core.native import reading
from core_fp6.kernels import cpu
from core_fp6.models.linear import FP6Linear
from core_fp6.timing import interleaved, one_thread
from core_fp6.weights.scaling import Scheme

if TYPE_CHECKING:
    from core import Run

_CAPABILITY = (8, 0)
"""Of the oldest GPU that multiplies bfloat16 matrices in its tensor cores."""


def kernels(run: Run) -> Iterator[Reading]:
    """What multiplies six-bit weights on the processor and on the GPU, and why."""
    yield _cpu()
    yield _triton()
    yield _gpu()


def _cpu() -> Reading:
    return reading(
        "CPU kernel",
        cpu.variant,
        slow=("plain", "eager"),
        advice="install a C compiler, or use a processor with AVX2",
    )


def _triton() -> Reading:
    if find_spec("triton") is None:
        advice = "pip install triton, if this machine has a GPU"
        return Reading(name="Triton", status="skip", value="not installed", advice=advice)
    return Reading(name="Triton", status="ok", value=version("triton"))


def _gpu() -> Reading:
    if not torch.cuda.is_available():
        return Reading(name="GPU", status="skip", value="none, or none that torch can use")
    capability = torch.cuda.get_device_capability()
    good = capability >= _CAPABILITY
    advice = "its tensor cores have no bfloat16: use float16 activations"
    return Reading(
        name="GPU",
        status="ok" if good else "warn",
        value=torch.cuda.get_device_name(),
        limit=f"compute capability {'.'.join(map(str, capability))}",
        advice="" if good else advice,
    )


def cpu_linear(
    run: Run, size: int = 4096, tokens: tuple[int, ...] = (1, 4, 16)
) -> Iterator[Reading]:
    """A linear layer with six-bit weights against those of torch, in one thread.

    Args:
        run: not asked for anything.
        size: rows and columns.
        tokens: rows of the input.
    """
    torch.manual_seed(0)
    plain = nn.Linear(size, size, bias=False)
    six = FP6Linear.from_linear(plain, Scheme())
    for dtype in (torch.bfloat16, torch.float32):
        peer = nn.Linear(size, size, bias=False).to(dtype)
        for count in tokens:
            x = torch.randn(count, size).to(dtype)
            ways: dict[str, Callable[[], object]] = {
                "ours": partial(six, x),
                "torch": partial(peer, x),
            }
            with torch.no_grad(), one_thread():
                seconds = interleaved(ways, 30, 2.0, time.process_time)
            yield Reading(
                name=f"{size} x {size}, {count} tokens, {str(dtype).removeprefix('torch.')}",
                status="ok",
                value=min(seconds["torch"]) / min(seconds["ours"]),
                unit="x",
                limit="speed against nn.Linear; one thread, best of interleaved calls",
            )
