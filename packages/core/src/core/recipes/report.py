"""What a training run shows and leaves behind: progress, metrics.jsonl, loss.png, tables."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from core.contributions import Row
from core.disk import replace_file

if TYPE_CHECKING:
    from core.run import Run

METRICS = "metrics.jsonl"


class Report:
    """Progress on the terminal and metrics on disk, from rank 0 only.

    ``metrics.jsonl`` holds one object a line: ``{"step": 1, "loss": 6.9, ...}``, losses in nats per
    token. A resumed run cuts it back to the step it resumes from.
    """

    def __init__(self, run: Run, steps: int, done: int) -> None:
        self._run = run
        self._path = run.folder / METRICS
        self._began = time.perf_counter()
        self._tokens = 0
        self._held_out: float | None = None
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        shown = TextColumn("{task.fields[figures]}"), TimeRemainingColumn()
        console = Console(stderr=True)
        self._progress = Progress(
            *columns, *shown, console=console, disable=not (run.is_main and console.is_terminal)
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, figures="")
        if run.is_main:
            kept = [line for line in read_metrics(run.folder) if line["step"] <= done]
            replace_file(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def step(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Record an optimizer step over ``tokens`` tokens of all ranks."""
        self._tokens += tokens
        if not self._run.is_main:
            return
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._held_out = metrics.get("held_out_loss", self._held_out)
        held_out = "" if self._held_out is None else f"  held-out {self._held_out:.3f}"
        figures = f"loss {metrics['loss']:.3f}{held_out}  {self.tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, figures=figures)
        if self._progress.disable and "held_out_loss" in metrics:
            self._run.tell(f"step {step}: {figures}")

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second since this report was opened."""
        return self._tokens / max(1e-9, time.perf_counter() - self._began)

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._progress.stop()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's ``metrics.jsonl``; a kill may have torn the last one."""
    path = folder / METRICS
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def plot_losses(folder: Path, baselines: Mapping[str, float]) -> Path:
    """Draw ``loss.png`` from ``metrics.jsonl``.

    Args:
        folder: the run's folder.
        baselines: held-out losses of other models, drawn as horizontal lines.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(folder)
    held = [line for line in lines if "held_out_loss" in line]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([x["step"] for x in lines], [x["loss"] for x in lines], lw=0.8, label="training")
    axes.plot(
        [x["step"] for x in held], [x["held_out_loss"] for x in held], marker="o", label="held out"
    )
    for index, (name, loss) in enumerate(baselines.items()):
        axes.axhline(loss, ls="--", color=f"C{index + 2}", label=f"{name}: {loss:.3f}")
    axes.set(xlabel="optimizer steps", ylabel="loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on the terminal."""
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_rows(title: str, rows: Iterable[tuple[str, Row]]) -> None:
    """Print the closing table of a recipe: who, what, the figure, the plain way, remarks."""
    head = ("by", "what", "figure", "plain way", "note")
    print_table(title, head, [(by, r.what, r.ours, r.plain, r.note) for by, r in rows])
