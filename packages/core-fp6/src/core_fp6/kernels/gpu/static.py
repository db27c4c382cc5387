"""What the fused kernel costs before any GPU runs it: instructions of its inner loop.

Triton brings the assembler and the disassembler. Decoding decides whether a product is bound by
memory: an H200 has time for 2.6 operations of the integer units and 5.1 instructions per weight
while the weight arrives (132 multiprocessors, 1.755 GHz, 90% of 4.8 TB/s, 0.75 bytes per weight).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.errors import EngineError
from core.triton import OPTIONS, triton
from core_fp6.kernels.gpu.arguments import OPERANDS
from core_fp6.kernels.gpu.configs import Config
from core_fp6.kernels.gpu.fused import linear_kernel
from core_fp6.layouts.execution import BLOCK, UPPER
from core_fp6.weights.scaling import Scheme

INTEGER_UNIT = frozenset(
    [
        "BMSK",
        "FLO",
        "IABS",
        "IADD3",
        "IMNMX",
        "ISETP",
        "LEA",
        "LOP3",
        "PLOP3",
        "POPC",
        "PRMT",
        "SEL",
        "SGXT",
        "SHF",
        "VABSDIFF",
        "VIADD",
        "VIMNMX",
    ]
)
"""Instructions of the integer units of Hopper. ``IMAD``, which the assembler also takes for moves
and left shifts, runs on the units for floating-point multiplication and is counted apart; so are
those of the uniform unit, which has one lane for a warp."""

_ADDRESS = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9]*)(?P<rest>[^;]*);"
)
_LABEL = re.compile(r"^(?P<label>\.L_x_\d+):")
_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Counts:
    """Instructions of a thread in the loop over columns, for each weight that it decodes.

    Args:
        instructions: all of them.
        integer: of the integer units.
        multiply_adds: ``IMAD``.
        shared_stores: stores to shared memory, other than copies from global memory.
        spills: loads and stores of spilled registers in the whole kernel, in all.
    """

    instructions: float
    integer: float
    multiply_adds: float
    shared_stores: float
    spills: int


def counts(
    scheme: Scheme, dtype: torch.dtype, config: Config, *, even: bool = True, capability: int = 90
) -> Counts:
    """Compile the fused kernel and count.

    Args:
        scheme: of the weight.
        dtype: of the activations; float8_e4m3fn for those rounded to FP8.
        config: sizes of tiles.
        even: whether rows fill whole blocks of columns.
        capability: of the device to compile for, such as 90.

    Raises:
        EngineError: when the disassembler of Triton is not there.
    """
    loop, everything = _loop(_disassembled(_compiled(scheme, dtype, config, even, capability)))
    names = Counter(loop)
    weights = config.rows * BLOCK / (32 * config.warps)
    return Counts(
        instructions=len(loop) / weights,
        integer=sum(names[name] for name in INTEGER_UNIT) / weights,
        multiply_adds=names["IMAD"] / weights,
        shared_stores=(names["STS"] + names["STSM"]) / weights,
        spills=sum(name in ("LDL", "STL") for name in everything),
    )


def _compiled(
    scheme: Scheme, dtype: torch.dtype, config: Config, even: bool, capability: int
) -> bytes:
    name = _NAMES[dtype]
    constants = {
        "UPPER": UPPER[scheme.format],
        "MANTISSA": scheme.format.mantissa,
        "GROUP": scheme.group_size,
        "DTYPE": OPERANDS[dtype],
        "EVEN": even,
        "BIAS": config.splits == 1,
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "SPLITS": config.splits,
        "WARPS": config.warps,
    }
    pointers = {
        "x_ptr": name,
        "low_ptr": "i32",
        "high_ptr": "i32",
        "scale_ptr": "bf16" if scheme.group_size else "fp32",
        "token_scale_ptr": "fp32",
        "bias_ptr": "bf16",
        "out_ptr": "fp32" if config.splits > 1 else "bf16" if name == "fp8e4nv" else name,
    }
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compiled(linear_kernel, pointers, constants, options, capability)


def compiled(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int],
    capability: int = 90,
) -> bytes:
    """Machine code of a kernel, as the launcher would have it made for large multiples of 16.

    Args:
        kernel: to compile.
        pointers: names and types of the parameters that are pointers.
        constants: names and values of parameters known at compile time. The launcher counts
            integers that are 1 among them. All others are integers of 32 bits.
        options: numbers of warps and stages.
        capability: of the device to compile for, such as 90.
    """
    signature = {name: _kind(name, pointers, constants) for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind != "constexpr" and name not in kernel.do_not_specialize
    }
    made = triton.compile(
        triton.compiler.ASTSource(kernel, signature, constants, aligned),
        target=triton.compiler.compiler.GPUTarget("cuda", capability, 32),
        options={**options, **OPTIONS},
    )
    return bytes(made.asm["cubin"])


def _kind(name: str, pointers: dict[str, str], constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    return f"*{pointers[name]}" if name in pointers else "i32"


def _disassembled(binary: bytes) -> str:
    tool = triton.knobs.nvidia.nvdisasm.path
    if not Path(tool).is_file():
        raise EngineError("no disassembler", why=f"{tool} is missing", fix="reinstall triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def _loop(assembly: str) -> tuple[list[str], list[str]]:
    """Names of the instructions of the loop with the most matrix products, and of all."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in assembly.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label["label"]] = len(names)
        elif found := _ADDRESS.search(line):
            names.append(found["name"])
            target = re.search(r"\.L_x_\d+", found["rest"])
            if found["name"] == "BRA" and target and target[0] in labels:
                loops.append(names[labels[target[0]] :])
    return max(loops, key=lambda loop: sum(name.endswith("MMA") for name in loop)), names
