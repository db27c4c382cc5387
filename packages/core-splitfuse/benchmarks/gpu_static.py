"""Registers, shared memory and instructions of the kernel of attention; no GPU is needed.

python benchmarks/gpu_static.py [--capability 90]
"""

from __future__ import annotations

import argparse
import itertools

import torch

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu import static
from core_splitfuse.attention.gpu.rotation import Rotation
from core_splitfuse.attention.gpu.tiles import Heads, for_chunks, for_decodes

DIMS = (64, 64), (128, 128), (192, 128), (256, 256)
DTYPES = torch.bfloat16, torch.float32


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90, choices=[80, 90])
    capability = parser.parse_args().capability
    device = static.HOPPER if capability == 90 else static.AMPERE
    print(
        "dims       dtype     what     rows keys warps  registers  spills  shared    all  products"
    )
    for dims, dtype in itertools.product(DIMS, DTYPES):
        line = torch.ones(1, dtype=torch.int32)
        turned = Rotation(torch.ones(1, dims[0] // 2), line, torch.ones(1))
        heads = Heads(32, 8, *dims, dtype.itemsize)
        for tile_for, rotation in itertools.product((for_decodes, for_chunks), (None, turned)):
            tile = tile_for(heads, device)
            cost = static.attending(heads, tile, dtype, Rule(0.1), rotation, capability=capability)
            what = tile_for.__name__.removeprefix("for_") + (" turned" if rotation else "")
            name = str(dtype).removeprefix("torch.")
            print(
                f"{dims!s:10} {name:8} {what:15} {tile.rows:4} {tile.keys:4} {tile.warps:5} "
                f"{cost.registers:7} {cost.spills:7} {cost.shared_memory:7} "
                f"{cost.instructions:6} {cost.products:9}",
                flush=True,
            )


if __name__ == "__main__":
    main()
