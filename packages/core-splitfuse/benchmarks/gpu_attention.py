"""Paged attention of one layer on a GPU: the own kernels, torch's, flash-attn's, SDPA.

Decodes are bound by memory: their share is the bytes of keys and values per second, of what a copy
moves on the same device. Chunks are bound by arithmetic, and have TFLOP/s. Layers follow each other
in a CUDA graph, with several times the L2 cache of keys and values in all, as they do in a model.
Peers that do not read blocks get keys and values side by side, for nothing.

    python benchmarks/gpu_attention.py [--tiles] [--json PATH]
    TRITON_INTERPRET=1 python benchmarks/gpu_attention.py --device cpu --tiny
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from core_splitfuse.attention.dense import Rule
from core_splitfuse.attention.gpu import Plan, Spread, attending, varlen
from core_splitfuse.attention.gpu.tiles import Heads, Tile, device_of, for_chunks, for_decodes

BLOCK = 64
MOST_BYTES = 24 * 2**30
L2_TIMES = 4
REPLAYS = 10
MODELS = {"32 heads": (32, 32, 128), "32/8 heads": (32, 8, 128)}
BATCHES = 1, 4, 16, 32, 64, 128, 256
CONTEXTS = 1024, 4096, 16384, 32768
CHUNKS = (512, 0), (512, 4096), (512, 16384), (2048, 0), (64, 16384)

Call = Callable[[], Tensor]


@dataclass
class Asked:
    """A sequence of a pass."""

    begin: int
    end: int
    table: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A pass of one kind.

    Args:
        name: of the row.
        model: heads, key heads and dimensions.
        spans: begin and end of every sequence.
    """

    name: str
    model: tuple[int, int, int]
    spans: tuple[tuple[int, int], ...]

    @property
    def store_bytes(self) -> int:
        """Keys and values that have to be read."""
        return sum(end for _, end in self.spans) * self.model[1] * self.model[2] * 4

    @property
    def flops(self) -> int:
        """Of both products, without what the causal mask hides."""
        pairs = sum((b + e + 1) * (e - b) // 2 for b, e in self.spans)
        return 4 * pairs * self.model[0] * self.model[2]


class Layers:
    """Random queries, and stores of several layers with the same tables."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.heads, key_heads, dim = case.model
        self.rule = Rule(dim**-0.5)
        self.device = device
        self.spans = [Asked(*span) for span in case.spans]
        needs = [-(-span.end // BLOCK) for span in self.spans]
        order = torch.randperm(sum(needs))
        for span, part in zip(self.spans, order.split(needs), strict=True):
            span.table = part.tolist()
        cache = torch.cuda.get_device_properties(0).L2_cache_size if device.type == "cuda" else 0
        count = max(1, min(16, -(-L2_TIMES * cache // case.store_bytes)))
        shape = sum(needs), BLOCK, key_heads, dim
        dtype = torch.bfloat16
        self.stores = [
            tuple(torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
            for _ in range(count)
        ]
        tokens = sum(span.end - span.begin for span in self.spans)
        self.query = torch.randn(tokens, self.heads, dim, device=device, dtype=dtype)

    def plan(self, spread: Spread | None = None) -> Plan:
        return Plan.make(self.spans, BLOCK, self.device, spread=spread)

    def dense(self) -> list[list[tuple[Tensor, Tensor]]]:
        """For every layer and sequence (L, Hkv, D) keys and values."""
        return [
            [
                tuple(x[torch.tensor(s.table)].flatten(0, 1)[: s.end] for x in store)
                for s in self.spans
            ]
            for store in self.stores
        ]


def own(layers: Layers, spread: Spread | None = None) -> list[Call]:
    """The own kernels."""
    plan = layers.plan(spread)
    return [
        lambda store=store: attending.attend(layers.query, *store, plan, layers.rule)
        for store in layers.stores
    ]


def flash_attention_3(layers: Layers) -> list[Call]:
    """The varlen_attn of torch with a block table."""
    plan = layers.plan()
    return [
        lambda store=store: varlen.attend(layers.query, *store, plan, layers.rule)
        for store in layers.stores
    ]


def varlen_side_by_side(layers: Layers) -> list[Call]:
    """The varlen_attn of torch, as it is installed, over keys and values without blocks."""
    from torch.nn.attention.varlen import varlen_attn

    plan = layers.plan()
    ends = torch.nn.functional.pad(plan.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    def call(parts: list[tuple[Tensor, Tensor]]) -> Call:
        keys, values = (torch.cat(list(x)) for x in zip(*parts, strict=True))
        longest = plan.longest_query, plan.longest_key
        more: Any = {"window_size": (-1, 0), "enable_gqa": layers.heads != keys.shape[1]}
        return lambda: varlen_attn(
            layers.query,
            keys,
            values,
            plan.starts,
            ends,
            *longest,
            scale=layers.rule.scaling,
            **more,
        )

    return [call(parts) for parts in layers.dense()]


def flash_attn_package(layers: Layers) -> list[Call]:
    """flash-attn's function for packed rows, over blocks."""
    flash_attn: Any = importlib.import_module("flash_attn")
    plan = layers.plan()
    ends = torch.nn.functional.pad(plan.lengths.cumsum(0, dtype=torch.int32), (1, 0))

    def call(store: tuple[Tensor, Tensor]) -> Call:
        return lambda: flash_attn.flash_attn_varlen_func(
            layers.query, *store, plan.starts, ends, plan.longest_query, plan.longest_key,
            causal=True, block_table=plan.tables,
        )  # fmt: skip

    return [call(store) for store in layers.stores]


def one_by_one(layers: Layers) -> list[Call]:
    """SDPA for every sequence, over keys and values without blocks."""
    from torch.nn.attention.bias import causal_lower_right

    rows = layers.plan().starts.tolist()

    def attend(index: int, keys: Tensor, values: Tensor) -> Tensor:
        query = layers.query[rows[index] : rows[index + 1]].transpose(0, 1).unsqueeze(0)
        count = query.shape[2]
        mask: Any = causal_lower_right(count, len(keys)) if count > 1 else None
        return scaled_dot_product_attention(
            query,
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            scale=layers.rule.scaling,
            enable_gqa=True,
        )[0].transpose(0, 1)

    def call(parts: list[tuple[Tensor, Tensor]]) -> Call:
        return lambda: torch.cat([attend(i, *part) for i, part in enumerate(parts)])

    return [call(parts) for parts in layers.dense()]


CANDIDATES: dict[str, Callable[[Layers], list[Call]]] = {
    "core": own,
    "core, not split": lambda layers: own(layers, Spread(1, least_keys=2**30)),
    "core, fixed splits": lambda layers: own(layers, Spread(1, split_tokens=1024)),
    "varlen_attn FA3": flash_attention_3,
    "varlen_attn, no blocks": varlen_side_by_side,
    "flash-attn": flash_attn_package,
    "SDPA, no blocks": one_by_one,
}


def cases(tiny: bool) -> Iterator[Case]:
    """All passes that are measured."""
    if tiny:
        yield Case("decode 2 x 70", (4, 2, 16), ((69, 70), (40, 41)))
        yield Case("chunk 20 + 30", (4, 2, 16), ((30, 50),))
        return
    for name, model in MODELS.items():
        for batch, context in itertools.product(BATCHES, CONTEXTS):
            case = Case(f"{name}: {batch} x {context}", model, ((context - 1, context),) * batch)
            if case.store_bytes <= MOST_BYTES:
                yield case
        for count, past in CHUNKS:
            yield Case(f"{name}: chunk {count} + {past}", model, ((past, past + count),))
        mixed = ((2000, 2480), *((2047, 2048),) * 32)
        yield Case(f"{name}: 480 + 32 decodes", model, mixed)
        ragged = tuple((n - 1, n) for n in (32768, *range(256, 8192, 256)))
        yield Case(f"{name}: 32 ragged", model, ragged)


def milliseconds(calls: list[Call], device: torch.device) -> float:
    """Time of one of the calls: the median of some replays of a graph of all."""
    if device.type != "cuda":
        begin = time.process_time()
        for call in calls:
            call()
        return (time.process_time() - begin) / len(calls) * 1000
    stream: Any = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(
        2**31 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds([lambda: target.copy_(source)], device) * 1000


def measured(case: Case, device: torch.device, missing: dict[str, str]) -> list[dict[str, Any]]:
    """A row for every candidate that is there."""
    layers = Layers(case, device)
    exact = torch.cat([call().float() for call in one_by_one(layers)[:1]])
    found: list[dict[str, Any]] = []
    for name, candidate in CANDIDATES.items():
        if name in missing:
            continue
        row = {"case": case.name, "name": name, "bytes": case.store_bytes, "flops": case.flops}
        try:
            calls = candidate(layers)
            error = (calls[0]().float() - exact).abs().max().item()
            found.append({**row, "error": error, "milliseconds": milliseconds(calls, device)})
        except torch.OutOfMemoryError:
            print(f"{case.name}: no memory for {name}", file=sys.stderr)
        except (ImportError, RuntimeError) as problem:
            missing[name] = str(problem).splitlines()[0][:100]
    return found


def print_table(rows: list[dict[str, Any]], bandwidth: float) -> None:
    """A line for every case and candidate."""
    print(f"{'case':34} {'':24} {'us':>10} {'% copy':>7} {'TFLOP/s':>8} {'error':>8}")
    for row in rows:
        seconds = row["milliseconds"] / 1000
        share = row["bytes"] / seconds / bandwidth * 100
        line = f"{row['case']:34} {row['name']:24} {seconds * 1e6:10.1f} {share:7.1f}"
        print(f"{line} {row['flops'] / seconds / 1e12:8.1f} {row['error']:8.4f}")


def try_tiles(device: torch.device, chosen: list[Case]) -> list[dict[str, Any]]:
    """The own kernels with other sizes than those that are built in."""
    found: list[dict[str, Any]] = []
    for case in chosen:
        layers = Layers(case, device)
        heads = Heads(*case.model, case.model[2], 2)
        short = all(end - begin == 1 for begin, end in case.spans)
        known = (for_decodes if short else for_chunks)(heads, device_of(device))
        patched = f"core_splitfuse.attention.gpu.attending.for_{'decodes' if short else 'chunks'}"
        for tile in _tiles(known, short):
            with mock.patch(patched, lambda *_, tile=tile: tile):
                try:
                    calls = own(layers)
                    took = milliseconds(calls, device)
                except Exception as problem:
                    print(f"{case.name:34} {tile}: {type(problem).__name__}", file=sys.stderr)
                    continue
            row = {"case": case.name, **dataclasses.asdict(tile), "milliseconds": took}
            found.append({**row, "built in": tile == known})
            print(f"{case.name:34} {took * 1000:10.1f} us {tile}{' *' * (tile == known)}")
    return found


def _tiles(known: Tile, short: bool) -> Iterator[Tile]:
    rows = (known.rows,) if short else (64, 128)
    for row, keys, warps, stages in itertools.product(rows, (32, 64, 128), (4, 8), (2, 3, 4)):
        heads = min(known.heads, row)
        yield dataclasses.replace(
            known, rows=row, heads=heads, keys=keys, warps=warps, stages=stages
        )


def activate_flash_attention_3(missing: dict[str, str]) -> None:
    """Have torch use FlashAttention 3 where it is installed."""
    from torch.nn.attention import activate_flash_attention_impl

    try:
        activate_flash_attention_impl("FA3")
    except Exception as problem:
        missing["varlen_attn FA3"] = str(problem).splitlines()[0][:100]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two small passes, to try the script")
    parser.add_argument("--tiles", action="store_true", help="try other sizes of tiles, too")
    parser.add_argument("--seconds", type=float, default=400, help="begin no case after that")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing can be measured here", file=sys.stderr)
        return 2
    missing: dict[str, str] = {}
    activate_flash_attention_3(missing)
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "interpreter"
    print(f"{name}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    ends, left_out = time.monotonic() + chosen.seconds, 0
    for case in cases(chosen.tiny):
        if time.monotonic() > ends:
            left_out += 1
            continue
        rows += measured(case, device, missing)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print_table(rows, bandwidth)
    for peer, why in missing.items():
        print(f"{peer} is not there: {why}")
    if left_out:
        print(f"{left_out} cases were left out: the time was over")
    tiles = try_tiles(device, _for_tiles(chosen.tiny)) if chosen.tiles else []
    if chosen.json:
        content = {"device": name, "torch": torch.__version__, "copy": bandwidth, "rows": rows}
        content |= {"missing": missing, "left out": left_out, "tiles": tiles}
        chosen.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0 if all(math.isfinite(row["error"]) for row in rows) else 1


def _for_tiles(tiny: bool) -> list[Case]:
    if tiny:
        return list(cases(tiny=True))[:1]
    model = MODELS["32/8 heads"]
    decodes = [Case(f"{n} x {c}", model, ((c - 1, c),) * n) for n, c in ((32, 4096), (1, 32768))]
    return [*decodes, Case("chunk 512 + 4096", model, ((4096, 4608),))]


if __name__ == "__main__":
    sys.exit(main())
