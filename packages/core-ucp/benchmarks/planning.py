"""CPU time of planning: 1000 tensors over 512 ranks, placed, proven tiled, and resharded.

Nothing is read or written. The comparison computes the same shards with the functions that
DTensor plans with, one call per tensor and rank, on fewer tensors, and scales the time up.

    python benchmarks/planning.py [--tensors 1000] [--ranks 512]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import numpy as np
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from core_ucp.layout.flat import FlatGroup
from core_ucp.layout.layouts import Layout, Shard
from core_ucp.layout.mesh import Mesh
from core_ucp.view.boxes import Boxes, overlaps, untiled

Shapes = list[tuple[int, ...]]


def shapes_of(count: int) -> Shapes:
    """Shapes of a decoder's tensors, no two layers alike, so that nothing can be reused."""
    shapes: Shapes = []
    layer = 0
    while len(shapes) < count:
        width = 4096 + 16 * (layer % 64)
        shapes += [(width, width), (3 * width, width), (width, 4 * width), (4 * width, width)]
        shapes += [(width,), (width,), (3 * width,)]
        layer += 1
    return shapes[:count]


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def placed(layout: Layout, shapes: Shapes, mesh: Mesh) -> list[Boxes]:
    """Boxes of all tensors under a layout."""
    return [layout.place_all(shape, mesh).boxes for shape in shapes]


def flat(shapes: Shapes, ranks: int) -> list[Boxes]:
    """Boxes of all tensors in the flat vector of ZeRO-1."""
    names = tuple(str(index) for index in range(len(shapes)))
    numels = {name: int(np.prod(shape)) for name, shape in zip(names, shapes, strict=True)}
    spans = FlatGroup(names).spans(numels, ranks)
    nowhere = np.zeros(ranks, np.int64)
    named = dict(zip(names, shapes, strict=True))
    return [pieces.boxes for pieces in spans.pieces(named, nowhere, nowhere, 4).values()]


def prove(shapes: Shapes, boxes: list[Boxes]) -> None:
    """Prove that boxes tile their tensors."""
    for shape, of in zip(shapes, boxes, strict=True):
        problem = untiled(shape, of)
        if problem:
            raise SystemExit(f"{shape} is not tiled: {problem}")


def reshard(left: list[Boxes], right: list[Boxes]) -> int:
    """Number of copies from one layout to another."""
    return sum(len(overlaps(a, b)[0]) for a, b in zip(left, right, strict=True))


def torch_shards(shapes: Shapes, ranks: int) -> None:
    """The shards that DTensor plans."""
    for shape in shapes:
        for rank in range(ranks):
            _compute_local_shape_and_global_offset(shape, (ranks,), [rank], [TorchShard(0)])


def main() -> None:
    """Print CPU seconds of every step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    shapes, ranks = shapes_of(arguments.tensors), arguments.ranks
    mesh = Mesh({"rank": ranks})
    made: dict[str, list[Boxes]] = {}

    def place(name: str, work: Callable[[], list[Boxes]]) -> None:
        made[name] = work()

    rows = {
        "place FSDP2 Shard(0)": lambda: place(
            "rows", lambda: placed(Shard(0, "rank"), shapes, mesh)
        ),
        "place TP columns": lambda: place(
            "columns",
            lambda: [Shard(len(s) - 1, "rank").place_all(s, mesh).boxes for s in shapes],
        ),
        "place ZeRO-1 flat": lambda: place("flat", lambda: flat(shapes, ranks)),
        "prove FSDP2 Shard(0)": lambda: prove(shapes, made["rows"]),
        "prove TP columns": lambda: prove(shapes, made["columns"]),
        "prove ZeRO-1 flat": lambda: prove(shapes, made["flat"]),
        "ZeRO-1 -> FSDP2": lambda: reshard(made["flat"], made["rows"]),
        "FSDP2 -> ZeRO-1": lambda: reshard(made["rows"], made["flat"]),
    }
    total = 0.0
    print(f"{len(shapes)} tensors, {ranks} ranks, best of {arguments.repeat}, CPU seconds")
    for name, work in rows.items():
        seconds = min(cpu_seconds(work) for _ in range(arguments.repeat))
        total += seconds
        print(f"  {name:24} {seconds:8.3f}")
    print(f"  {'total':24} {total:8.3f}")
    few = shapes[: max(1, len(shapes) // 100)]
    theirs = cpu_seconds(lambda: torch_shards(few, ranks)) * len(shapes) / len(few)
    ours = min(cpu_seconds(rows["place FSDP2 Shard(0)"]) for _ in range(arguments.repeat))
    print(f"  DTensor's functions, one call per tensor and rank (scaled up): {theirs:.1f}")
    print(f"  ratio for placing Shard(0): {theirs / ours:.0f}x")


if __name__ == "__main__":
    main()
