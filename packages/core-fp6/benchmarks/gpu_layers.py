"""Linear layers of Llama-3 70B on a GPU: six-bit weights against bfloat16, FP8 and decoding first.

A CUDA graph runs different layers one after the other, several times as large as the L2 cache, so
that weights come from memory as they do in a model. Random codes stand for weights. The percentage
is what a product moves (weights, activations and output, each once) per second, of what a copy
moves on the same device.

    python benchmarks/gpu_layers.py [--tokens 1 16 ...] [--shapes 8192x10240 ...] [--tune] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from core_fp6.layouts import execution
from core_fp6.weights.numbers import E2M3, E3M2
from core_fp6.weights.packed import Packed
from core_fp6.weights.scaling import ROW, Scheme

SHAPES = "8192x10240", "8192x8192", "8192x57344", "28672x8192"
TOKENS = 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096
SCHEMES = Scheme(E2M3, 128), Scheme(E3M2, ROW)
FP8 = torch.float8_e4m3fn
L2_TIMES = 4
REPLAYS = 20

Call = Callable[[Tensor], Tensor]


def random_weight(rows: int, columns: int, scheme: Scheme) -> Packed:
    """A weight of random codes: all of them are numbers."""
    low, high = (
        torch.randint(0, 256, (rows, size), dtype=torch.uint8, device="cuda")
        for size in execution.planes_shape(columns)
    )
    shape = scheme.scale_shape(torch.Size((rows, columns)))
    scale = torch.full(shape, 0.01, dtype=scheme.scale_dtype, device="cuda")
    return Packed(low, high, scale, scheme, columns, "execution")


def milliseconds(calls: list[Call], x: Tensor) -> float:
    """Time of one of the calls: the median of many replays of a graph of all."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds([lambda _: target.copy_(source)], source) * 1000


def bf16_layers(rows: int, columns: int, count: int) -> list[Call]:
    """Plain products."""
    made = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(count)]
    return [partial(linear, weight=weight) for weight in made]


def fp8_layers(rows: int, columns: int, count: int) -> list[Call]:
    """Products of FP8 weights and activations, the rounding of activations left out."""
    one = torch.ones((), device="cuda")

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return torch._scaled_mm(x.to(FP8), weight.T, one, one, out_dtype=torch.bfloat16)

    made = [torch.randn(rows, columns, device="cuda").to(FP8) for _ in range(count)]
    return [partial(product, weight=weight) for weight in made]


def six_bit_layers(
    weights: list[Packed], *, fp8: bool = False, library: bool = False
) -> list[Call]:
    """Products as this package computes them, or always decoded to memory first."""
    from core_fp6.kernels import gpu
    from core_fp6.kernels.gpu import library as decoded

    def product(x: Tensor, weight: Packed) -> Tensor:
        if library:
            return decoded.linear(x, weight, None)
        with gpu.fp8_activations(fp8):
            return gpu.linear(x, weight)

    return [partial(product, weight=weight) for weight in weights]


def measured(shape: str, tokens: list[int], tune: bool) -> list[dict[str, object]]:
    """Milliseconds of all candidates for a shape."""
    from core_fp6.kernels import gpu

    columns, rows = map(int, shape.split("x"))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(20, max(3, L2_TIMES * cache // (rows * columns * 3 // 4) + 1))
    inputs = {size: torch.randn(size, columns, device="cuda").bfloat16() for size in tokens}
    found: list[dict[str, object]] = []

    def add(name: str, layers: list[Call], weight_bytes: int) -> None:
        for size, x in inputs.items():
            moved = weight_bytes + 2 * size * (rows + columns)
            time = milliseconds(layers, x)
            row = {"shape": shape, "tokens": size, "name": name, "milliseconds": time}
            found.append({**row, "bytes": moved})

    add("bfloat16", bf16_layers(rows, columns, count), 2 * rows * columns)
    if torch.cuda.get_device_capability() >= (8, 9):
        add("fp8", fp8_layers(rows, columns, count), rows * columns)
    for scheme in SCHEMES:
        weights = [random_weight(rows, columns, scheme) for _ in range(count)]
        if tune:
            gpu.prepare(weights[:1], tokens)
        add(scheme.name, six_bit_layers(weights), weights[0].nbytes)
        add(f"{scheme.name} decoded", six_bit_layers(weights, library=True), weights[0].nbytes)
        if torch.cuda.get_device_capability() >= (8, 9):
            add(f"{scheme.name} fp8", six_bit_layers(weights, fp8=True), weights[0].nbytes)
    return found


def print_table(rows: list[dict[str, object]], bandwidth: float) -> None:
    """A line for every shape, number of tokens and candidate."""
    base = {(r["shape"], r["tokens"]): r["milliseconds"] for r in rows if r["name"] == "bfloat16"}
    print(f"{'K x N':>12} {'M':>5} {'':18} {'us':>9} {'x bf16':>7} {'% copy':>7}")
    for row in rows:
        time = float(str(row["milliseconds"]))
        ratio = float(str(base[row["shape"], row["tokens"]])) / time
        share = float(str(row["bytes"])) / time * 1000 / bandwidth * 100
        line = f"{row['shape']:>12} {row['tokens']:>5} {row['name']:18}"
        print(f"{line} {time * 1000:9.1f} {ratio:7.2f} {share:7.1f}")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tune", action="store_true", help="measure kernels before")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing can be measured here", file=sys.stderr)
        return 2
    bandwidth = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    rows = []
    for shape in chosen.shapes:
        rows += measured(shape, chosen.tokens, chosen.tune)
        torch.cuda.empty_cache()
    print_table(rows, bandwidth)
    if chosen.json:
        content = {"device": name, "torch": torch.__version__, "copy": bandwidth, "rows": rows}
        chosen.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
