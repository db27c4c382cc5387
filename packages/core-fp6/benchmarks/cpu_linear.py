"""Products on a processor: six-bit weights against torch's layers and other narrow weights.

All candidates of a shape are interleaved in one process with one thread, and each goes round copies
of its weight that are larger than the caches together. Times are CPU times of the thread: the least
and the median of the repetitions::

    python packages/core-fp6/benchmarks/cpu_linear.py --json cpu.json
    python packages/core-fp6/benchmarks/cpu_linear.py --shapes 4096x4096 --tokens 1 4 16 --peers
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from core.cli.table import echo_table
from core_fp6.kernels import cpu
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.packed import Packed, quantize
from core_fp6.weights.scaling import ROW, Scheme

SHAPES = "1024x4096", "4096x4096", "11008x4096", "4096x11008"
TOKENS = 1, 2, 4, 8, 16, 17, 32, 64, 128, 256, 512
SCHEMES = Scheme(E2M3, 128), Scheme(E3M2, ROW)
CACHES = 96 * 2**20
"""Bytes of all copies of a weight, at least."""

Candidate = Callable[[int], object]
"""Multiplies with one of the copies of a weight."""


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="Rows x columns of weights.")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=30, help="Of every candidate.")
    parser.add_argument("--peers", action="store_true", help="Other narrow weights as well.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the figures there.")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = cpu.variant()
    print(f"torch {torch.__version__}, variant {found.name} ({found.reason})")
    results: list[dict[str, Any]] = []
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        weight = torch.randn(rows, columns) * 0.02
        for tokens in given.tokens:
            candidates = dict(_candidates(weight, torch.randn(tokens, columns), given.peers))
            times = measure(candidates, given.repeats)
            for name, values in times.items():
                least, median = min(values), statistics.median(values)
                results.append(
                    {"shape": shape, "tokens": tokens, "name": name, "min": least, "median": median}
                )
            if given.json:
                given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(
            f"\nWeight {shape}; ms, and speed against torch's layer of the same input: min (median)"
        )
        echo_table(*table([result for result in results if result["shape"] == shape]))


def measure(candidates: dict[str, Candidate], repeats: int) -> dict[str, list[float]]:
    """Seconds of the thread for every repetition of every candidate, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(-1, repeats):
        for name, call in candidates.items():
            begin = time.thread_time()
            call(repeat)
            if repeat >= 0:
                times[name].append(time.thread_time() - begin)
    return times


def table(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row for each number of tokens, a column for each candidate."""
    names = list(dict.fromkeys(result["name"] for result in results))
    body: list[list[str]] = []
    for tokens in dict.fromkeys(result["tokens"] for result in results):
        row = {result["name"]: result for result in results if result["tokens"] == tokens}
        body.append([str(tokens), *(_cell(row, name) for name in names)])
    return ["tokens", *names], body


def _cell(row: dict[str, dict[str, Any]], name: str) -> str:
    if name not in row:
        return ""
    text = f"{1e3 * row[name]['min']:.2f}"
    base = row["float32" if name.endswith("float32") else "bfloat16"]
    if base is row[name]:
        return text
    least, median = (base[kind] / row[name][kind] for kind in ("min", "median"))
    return f"{text}  {least:.2f}x ({median:.2f}x)"


def _candidates(weight: Tensor, x: Tensor, peers: bool) -> Iterator[tuple[str, Candidate]]:
    half = x.bfloat16()
    yield "bfloat16", _torch(weight.bfloat16(), half)
    yield "float32", _torch(weight, x)
    for scheme in SCHEMES:
        copies = _copies_of_packed(quantize(weight, scheme, layout="execution"))
        yield f"{scheme.name} bfloat16", _ours(copies, half)
        yield f"{scheme.name} float32", _ours(copies, x)
    if peers:
        yield from _peers(weight, half)


def _torch(weight: Tensor, x: Tensor) -> Candidate:
    copies = _copies(weight)
    return lambda repeat: linear(x, copies[repeat % len(copies)])


def _ours(copies: list[Packed], x: Tensor) -> Candidate:
    return lambda repeat: cpu.linear(x, copies[repeat % len(copies)])


def _peers(weight: Tensor, x: Tensor) -> Iterator[tuple[str, Candidate]]:
    if x.shape[0] == 1:
        plain = _copies(weight.bfloat16())
        yield "torch.mv", lambda repeat: torch.mv(plain[repeat % len(plain)], x[0])
    eight, ones = _copies((weight * 1000).to(torch.int8)), torch.ones(len(weight)).bfloat16()
    yield (
        "aten int8",
        lambda repeat: torch.ops.aten._weight_int8pack_mm(x, eight[repeat % len(eight)], ones),
    )
    codes = torch.randint(0, 16, weight.shape, dtype=torch.int32)
    four = _copies(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2))
    scales = torch.ones(weight.shape[1] // 128, len(weight), 2).bfloat16()
    yield (
        "aten int4 g128",
        lambda repeat: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, four[repeat % len(four)], 128, scales
        ),
    )
    yield from _bitsandbytes(weight, x)


def _bitsandbytes(weight: Tensor, x: Tensor) -> Iterator[tuple[str, Candidate]]:
    try:
        from bitsandbytes import functional, matmul_4bit
    except ImportError:
        print("without bitsandbytes, which is not installed")
        return
    packed, state = functional.quantize_4bit(weight.bfloat16(), quant_type="nf4")
    copies = _copies(packed)

    def call(repeat: int) -> Tensor:
        return matmul_4bit(x, copies[repeat % len(copies)].t(), quant_state=state)

    yield "bitsandbytes NF4", call


def _copies(tensor: Tensor) -> list[Tensor]:
    return [tensor.clone() for _ in range(-(-CACHES // tensor.nbytes))]


def _copies_of_packed(packed: Packed) -> list[Packed]:
    return [
        Packed(
            packed.low.clone(),
            packed.high.clone(),
            packed.scale.clone(),
            packed.scheme,
            packed.columns,
            packed.layout,
        )
        for _ in range(-(-CACHES // packed.nbytes))
    ]


if __name__ == "__main__":
    main()
