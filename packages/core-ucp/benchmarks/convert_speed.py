"""What a conversion costs, against the converters of DeepSpeed and torch, and against ``cp``.

Every measurement runs in a process of its own, which first imports what it needs and then measures
its work alone: wall time, processor time with that of its children, and by how much its memory
grew. All of them end with an fsync of what they wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def ours(source: Path, target: Path) -> Callable[[], Any]:
    """This package: to a universal folder, with digests of all tensors."""
    from core.storage import FileSink, new_folder
    from core_ucp.execution.copying import execute
    from core_ucp.execution.planning import plan
    from core_ucp.sources.registry import open_checkpoint
    from core_ucp.targets.universal import build

    open_checkpoint(source)  # imports what opening needs

    def work() -> dict[str, float]:
        started = time.process_time()
        view = open_checkpoint(source)
        made = plan(view, build(view))
        planned = time.process_time() - started
        with new_folder(target) as folder:
            execute(made, folder, open_sink=FileSink)
        return {"planning": planned, "tensors": made.nbytes}

    return work


def copied(source: Path, target: Path) -> Callable[[], Any]:
    """``cp`` of all files of the source, whether the conversion needs them or not."""

    def work() -> None:
        subprocess.run(["cp", "-r", str(source), str(target)], check=True)
        synced(target)

    return work


def same_bytes(source: Path, target: Path) -> Callable[[], Any]:
    """``cp`` of a universal folder: as many bytes as the conversion writes."""
    made = source.parent / "universal"

    def work() -> None:
        subprocess.run(["cp", "-r", str(made), str(target)], check=True)
        synced(target)

    return work


def deepspeed(source: Path, target: Path) -> Callable[[], Any]:
    """DeepSpeed's ``ds_to_universal``."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.checkpoint.ds_to_universal import main

    arguments = argparse.Namespace(
        input_folder=str(source / "global_step1"),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )

    def work() -> None:
        main(arguments)
        synced(target)

    return work


def torch_save(source: Path, target: Path) -> Callable[[], Any]:
    """Torch's ``dcp_to_torch_save``."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    target.mkdir()

    def work() -> None:
        dcp_to_torch_save(source, target / "whole.pt")
        synced(target)

    return work


def synced(folder: Path) -> None:
    """Make all files of a folder durable."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


WAYS: dict[str, Callable[[Path, Path], Callable[[], Any]]] = {
    "core-ucp": ours,
    "cp of the source": copied,
    "cp of the result": same_bytes,
    "ds_to_universal": deepspeed,
    "dcp_to_torch_save": torch_save,
}
PEER = {"zero1": "ds_to_universal", "zero3": "ds_to_universal", "dcp": "dcp_to_torch_save"}


def measure(way: str, source: Path, target: Path) -> dict[str, float]:
    """Run one way in this process, and print what it took."""
    work = WAYS[way](source, target)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 # DeepSpeed prints progress
        shown, sys.stdout = sys.stdout, nowhere
        before, memory, started = _processor(), _peak(), time.perf_counter()
        found = work()
        wall, processor = time.perf_counter() - started, _processor() - before
        sys.stdout = shown
    return {"wall": wall, "cpu": processor, "memory": _peak() - memory, **(found or {})}


def _processor() -> float:
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(kind: str, width: int, world: int, folder: Path, repeats: int) -> dict[str, Any]:
    """Measure all ways that fit a kind of checkpoint, interleaved."""
    base = folder / f"{kind}-{width}"
    source = base / "saved"
    if not source.exists():
        call = [sys.executable, str(HERE / "artefacts.py"), kind, str(width), str(world)]
        subprocess.run([*call, str(source)], check=True, stdout=sys.stderr)
        _child("core-ucp", source, base / "universal")
    ways = ["core-ucp", "cp of the source", "cp of the result", PEER[kind]]
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in random.sample(ways, len(ways)):
            target = base / "target"
            found[way].append(_child(way, source, target))
            shutil.rmtree(target)
    return {"kind": kind, "ranks": world, **_figures(found)}


def _child(way: str, source: Path, target: Path) -> dict[str, float]:
    call = [sys.executable, __file__, "--measure", way, str(source), str(target)]
    # Each starts with the source in the page cache and nothing left to be written.
    for path in source.rglob("*"):
        if path.is_file():
            path.read_bytes()
    os.sync()
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _figures(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    own = found["core-ucp"]

    def times(way: str, what: str) -> float:
        pairs = zip(found[way], own, strict=True)
        return statistics.median(other[what] / mine[what] for other, mine in pairs)

    rows = {
        way: {
            "seconds": statistics.median(run["wall"] for run in runs),
            "cpu": statistics.median(run["cpu"] for run in runs),
            "memory_mb": statistics.median(run["memory"] for run in runs) / 1e6,
            "times_ours": times(way, "wall"),
            "times_our_cpu": times(way, "cpu"),
        }
        for way, runs in found.items()
    }
    planning = statistics.median(run["planning"] / run["wall"] for run in own)
    return {"tensor_mb": own[0]["tensors"] / 1e6, "planning_share": planning, "ways": rows}


def show(result: dict[str, Any]) -> None:
    """Print one comparison as a table."""
    print(
        f"\n{result['kind']} of {result['ranks']} ranks, {result['tensor_mb']:.0f} MB of tensors;"
        f" planning is {result['planning_share']:.1%} of the conversion's time\n"
    )
    print("| way | times our time | times our processor time | memory growth, MB |")
    print("|---|---|---|---|")
    for way, row in result["ways"].items():
        ratios = f"{row['times_ours']:.2f} | {row['times_our_cpu']:.2f}"
        print(f"| {way} | {ratios} | {row['memory_mb']:.0f} |")


def main() -> None:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/ucp-bench"))
    parser.add_argument("--kinds", nargs="+", default=["zero1", "zero3", "dcp"])
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "SOURCE", "TARGET"))
    wanted = parser.parse_args()
    if wanted.measure:
        way, source, target = wanted.measure
        print(json.dumps(measure(way, Path(source), Path(target))))
        return
    wanted.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for kind in wanted.kinds:
        for width in wanted.widths:
            arguments = (kind, width, wanted.ranks, wanted.folder, wanted.repeats)
            results.append(compare(*arguments))
            if not wanted.json:
                show(results[-1])
    if wanted.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
