"""Launches compile for devices that are not there, and keep their numbers in registers."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from core.softmax import Partial

triton = pytest.importorskip("triton")
if triton.knobs.nvidia.cuobjdump is None or not Path(triton.knobs.nvidia.cuobjdump.path).is_file():
    pytest.skip("this Triton comes without NVIDIA's tools", allow_module_level=True)

from core_fpdt.kernels.triton.launching import attend, differentiate  # noqa: E402

SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448}
"""Bytes that a program can have, by compute capability."""


class Compiled(NamedTuple):
    """A kernel that was compiled instead of launched."""

    name: str
    grid: tuple[int, ...]
    spills: int
    shared_memory: int


class NoDevice:
    """As much of a driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return triton.compiler.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 9000 + self.capability  # kernels remember what they compiled for a device

    def get_current_stream(self, device: int) -> int:
        return device


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Compiled]]:
    """Chooses a device; what is launched from then on is in the list."""
    run = triton.JITFunction.run

    def choose(capability: int) -> list[Compiled]:
        launches: list[Compiled] = []

        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            made = run(self, *args, grid=grid, warmup=True, **kwargs)
            launches.append(
                Compiled(
                    self.fn.__name__,
                    tuple(grid),
                    spills_of(made.asm["cubin"]),
                    int(made.metadata.shared),
                )
            )

        monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice(capability))
        monkeypatch.setattr(triton.JITFunction, "run", compile_only)
        return launches

    return choose


def spills_of(binary: bytes) -> int:
    """Bytes of the stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"\bSTACK:(\d+)", done.stdout + done.stderr)
    assert found is not None
    return int(found[1])


WIDTHS = {
    torch.bfloat16: [(64, 64), (128, 128), (192, 128), (256, 256)],
    torch.float16: [(128, 128)],
    torch.float32: [(64, 64), (256, 256)],
}
OFTEN = [
    (90, torch.bfloat16, (128, 128), "holes", 30.0),
    (80, torch.bfloat16, (64, 64), "causal", None),
]
CASES = [
    (capability, dtype, widths, kind, softcap)
    for capability in SHARED_MEMORY
    for dtype, all_widths in WIDTHS.items()
    for widths in all_widths
    for kind, softcap in [("causal", None), ("holes", 30.0)]
]


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "kind", "softcap"),
    [pytest.param(*case, marks=() if case in OFTEN else pytest.mark.nightly) for case in CASES],
)
def test_everything_compiles(capability, dtype, widths, kind, softcap, compiled, attention) -> None:
    launches = compiled(capability)
    shape = {"batch": 2, "heads": (8, 2), "tokens": (256, 256), "widths": widths}
    case = attention(kind, softcap=softcap, dtype=dtype, **shape)
    (_, tile), *_ = case.blocks([0, 256])
    whole = case.query.new_empty(case.query.shape[:3], dtype=torch.float32)
    attend(*case.inputs, tile, case.scores, Partial(case.grad, whole))
    differentiate(case.grad, *case.inputs, whole, whole, tile, case.scores)
    assert [launch.name for launch in launches] == ["forward_kernel", "key_kernel", "query_kernel"]
    # All heads of queries, but only those of keys where keys get gradients.
    assert [launch.grid[1] for launch in launches] == [16, 4, 16]
    for launch in launches:
        assert launch.spills <= 128, launch
        assert launch.shared_memory <= SHARED_MEMORY[capability], launch
