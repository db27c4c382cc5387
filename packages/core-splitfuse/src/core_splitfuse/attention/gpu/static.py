"""What kernels cost before any GPU runs them: registers, spills, shared memory, matrix units.

Triton brings the assembler and the disassembler, so kernels can be compiled for a device that is not
there.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from core.errors import EngineError
from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu.attending import constants
from core_splitfuse.attention.gpu.kernel import attend_kernel, merge_kernel
from core_splitfuse.attention.gpu.language import OPTIONS, triton
from core_splitfuse.attention.gpu.rotation import Rotation
from core_splitfuse.attention.gpu.tiles import Device, Heads, Tile, power_of_two
from core_splitfuse.attention.gpu.write import copy_kernel, write_kernel

HOPPER: Final = Device(processors=132, shared_memory=232448)
AMPERE: Final = Device(processors=108, shared_memory=166912)

_NAMES: Final = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_NUMBERS: Final = {"scaling": "fp32", "softcap": "fp32"}
_INTEGERS: Final = frozenset(
    ["table_ptr", "atom_ptr", "merge_ptr", "slot_ptr", "pair_ptr", "frequency_row_ptr"]
)
_SINGLE: Final = frozenset(
    ["part_ptr", "weight_ptr", "frequency_ptr", "frequency_scale_ptr", "ratio_ptr"]
)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][A-Z0-9]*)")


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel needs.

    Args:
        registers: of a thread.
        spills: bytes of the stack of a thread.
        shared_memory: bytes of a program.
        products: instructions of matrix units.
        copies: asynchronous copies from global to shared memory.
        instructions: all of them.
    """

    registers: int
    spills: int
    shared_memory: int
    products: int
    copies: int
    instructions: int


def attending(
    heads: Heads,
    tile: Tile,
    dtype: torch.dtype,
    rule: Rule,
    rotation: Rotation | None = None,
    *,
    block_size: int = 64,
    capability: int = 90,
) -> Cost:
    """Compile the kernel of attention and look at it.

    Args:
        heads: shape of the heads.
        tile: sizes of programs.
        dtype: of queries and the store.
        rule: what it asks for.
        rotation: of unrotated keys.
        block_size: tokens in a block of the store.
        capability: of the device to compile for, such as 90.

    Raises:
        EngineError: when the tools of Triton are not there.
    """
    known = constants(heads, tile, rule, rotation, block_size)
    return compiled(attend_kernel, known, dtype, capability, tile.warps, tile.stages)


def merging(heads: Heads, dtype: torch.dtype, capability: int = 90) -> Cost:
    """The same for the kernel that merges parts."""
    known = {
        "HEADS": heads.query,
        "VALUE_DIM": heads.value_dim,
        "VALUE_WIDTH": power_of_two(heads.value_dim),
    }
    return compiled(merge_kernel, known, dtype, capability)


def writing(heads: Heads, dtype: torch.dtype, capability: int = 90) -> Cost:
    """The same for the kernel that writes keys and values."""
    known = {
        "KEY_HEADS": heads.key,
        "DIM": heads.dim,
        "VALUE_DIM": heads.value_dim,
        "HEADS": power_of_two(heads.key),
        "WIDTH": heads.width,
    }
    return compiled(write_kernel, known, dtype, capability)


def copying(heads: Heads, dtype: torch.dtype, capability: int = 90) -> Cost:
    """The same for the kernel that copies blocks."""
    known = {"SIZE": 64 * heads.key * heads.dim, "COUNT": 1024}
    return compiled(copy_kernel, known, dtype, capability)


def compiled(
    kernel: Any,
    known: dict[str, Any],
    dtype: torch.dtype,
    capability: int,
    warps: int = 4,
    stages: int = 3,
) -> Cost:
    """Compile a kernel as its launch would have it compiled, for strides that are multiples of 16."""
    signature = {name: _kind(name, known, dtype) for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name.endswith("stride")
        if name not in kernel.do_not_specialize
    }
    made = triton.compile(
        triton.compiler.ASTSource(kernel, signature, known, aligned),
        target=triton.compiler.compiler.GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, **OPTIONS},
    )
    return _cost(bytes(made.asm["cubin"]), int(made.metadata.shared))


def _kind(name: str, known: dict[str, Any], dtype: torch.dtype) -> str:
    if name in known:
        return "constexpr"
    if not name.endswith("_ptr"):
        return _NUMBERS.get(name, "i32")
    kind = "i32" if name in _INTEGERS else "fp32" if name in _SINGLE else _NAMES[dtype]
    return f"*{kind}"


def _cost(binary: bytes, shared: int) -> Cost:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _told(triton.knobs.nvidia.cuobjdump, "-res-usage", file.name)
        assembly = _told(triton.knobs.nvidia.nvdisasm, "-c", file.name)
    names = Counter(found["name"] for found in _INSTRUCTION.finditer(assembly))
    return Cost(
        registers=_number("REG", usage),
        spills=_number("STACK", usage),
        shared_memory=shared,
        products=names["HMMA"] + names["HGMMA"],
        copies=names["LDGSTS"],
        instructions=names.total(),
    )


def _told(tool: Any, *words: str) -> str:
    if tool is None or not Path(tool.path).is_file():
        why = "Triton came without the tools of NVIDIA"
        raise EngineError("compiled kernels cannot be read", why=why, fix="reinstall triton")
    done = subprocess.run([tool.path, *words], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(name: str, usage: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise EngineError(f"cuobjdump does not tell {name}")
    return int(found[1])
