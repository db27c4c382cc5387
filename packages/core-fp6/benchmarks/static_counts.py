"""Instructions per weight of the fused kernel, counted in machine code; no GPU is needed.

python benchmarks/static_counts.py [--capability 90]
"""

from __future__ import annotations

import argparse

import torch

from core_fp6.kernels.gpu.configs import Config
from core_fp6.kernels.gpu.static import counts
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.scaling import ROW, Scheme

NARROW, WIDE = Config(128, 16), Config(128, 128, warps=8, stages=2)
ROWS = [
    (Scheme(fmt, group), dtype, NARROW)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    for fmt, group in ((E2M3, 128), (E3M2, ROW), (E2M3, ROW), (E2M3, 64), (E2M3, 32), (E3M2, 128))
] + [
    (Scheme(E2M3, 128), torch.float32, NARROW),
    (Scheme(E2M3, 128), torch.bfloat16, Config(64, 16)),
    (Scheme(E2M3, 128), torch.bfloat16, Config(128, 32)),
    (Scheme(E2M3, 128), torch.bfloat16, Config(128, 64, warps=8)),
    (Scheme(E2M3, 128), torch.bfloat16, WIDE),
    (Scheme(E3M2, ROW), torch.bfloat16, WIDE),
]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, default=90)
    capability = parser.parse_args().capability
    print("weights     activations     tile      all  integer  IMAD  spills")
    for scheme, dtype, config in ROWS:
        found = counts(scheme, dtype, config, capability=capability)
        name = str(dtype).removeprefix("torch.")
        tile = f"{config.rows}x{config.tokens}"
        print(
            f"{scheme.name:11} {name:15} {tile:8} {found.instructions:5.2f} {found.integer:8.2f} "
            f"{found.multiply_adds:5.2f} {found.spills:7}"
        )


if __name__ == "__main__":
    main()
