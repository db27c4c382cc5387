"""A checkpoint after every step of the quickstart's training: what it adds to the time of a step.

python packages/core-fastpersist/benchmarks/every_step.py --rounds 12 --folder /path/on/the/disk
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import core
from core.recipes.models import build_small
from core.recipes.optim import build_optimizers
from core.recipes.report import print_table
from core.recipes.settings import TrainSettings
from core_fastpersist.bench.overhead import PLAIN, Overhead, measure


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each kind")
    parser.add_argument("--steps", type=int, default=8, help="training steps in a block")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mode", choices=["auto", "copy", "live"], default="auto")
    parser.add_argument("--formats", nargs="+", default=["fastpersist", "dcp"])
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = build_small("quickstart", {"vocab_size": 2048})
    optimizers = build_optimizers(model, TrainSettings())
    ids = torch.randint(2048, (8, 128))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

    state = {"model": model, **optimizers}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        with core.start(folder=folder, quiet=True, fastpersist={"mode": args.mode}) as run:
            found = measure(
                run,
                state,
                step,
                tuple(args.formats),
                folder,
                rounds=args.rounds,
                steps=args.steps,
                tell=print,
            )
    report(found, args)


def report(found: Overhead, args: argparse.Namespace) -> None:
    """Print the table, and write it as JSON where that is wanted."""
    rows = [(PLAIN, f"{1000 * found.step():.1f} ms", "", "", "", "")]
    rows += [
        (
            name,
            f"{1000 * found.step(name):.1f} ms",
            f"{found.wall(name):+.1%}",
            f"{found.cpu(name):+.1%}",
            f"{found.nbytes[name] / 2**20:.1f} MiB",
            f"{found.knee(name):.2f}",
        )
        for name in found.durable
    ]
    head = ("checkpoints", "step", "wall", "processor", "bytes", "writing / step")
    print_table(f"{args.rounds} rounds of {args.steps} steps, {args.threads} threads", head, rows)
    if args.json is not None:
        args.json.write_text(json.dumps([dict(zip(head, row, strict=True)) for row in rows]))


if __name__ == "__main__":
    main()
