"""The step of this package in core's quickstart: the trained model with six-bit weights."""

from __future__ import annotations

import copy
import shutil
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from core import Row
from core.errors import ModelError
from core.recipes.models import load_model
from core.recipes.settings import TrainSettings
from core.recipes.train import evaluate
from core_fp6.models.linear import FP6Linear
from core_fp6.models.quantizing import quantize
from core_fp6.settings import FP6Settings
from core_fp6.streaming.quantizing import quantize_folder
from core_fp6.timing import interleaved
from core_fp6.weights.scaling import Scheme

if TYPE_CHECKING:
    from torch import Tensor, nn

    from core import Run
    from core.recipes.quickstart import Tour
    from core_fp6.models.report import Report

BOUND = 0.02
"""Nats per token by which the held-out loss may move. Rounding costs a hundredth of this."""
_ROUNDS, _SECONDS = 40, 3.0
_WIDE = 4096


def six_bits(run: Run, tour: Tour) -> Iterator[Row]:
    """Quantize a copy of the model, measure it, and leave a folder with it beside the export.

    Raises:
        ModelError: when the loss moves too far, or the folder is not the model in memory.
    """
    wanted = run.settings(FP6Settings)
    chosen = wanted.format, wanted.group_size, wanted.skip
    plain = copy.deepcopy(tour.model).eval()
    packed = copy.deepcopy(plain)
    report = quantize(packed, *chosen)
    yield _size(report, plain)
    yield _loss(run, tour, packed)
    yield _folder(run, tour, packed.eval(), chosen)
    ids = tour.data.held_out[:1, :1].to(run.device)
    yield _speed(
        "tokens per second, one at a time",
        lambda: _done(plain(input_ids=ids, use_cache=False).logits),
        lambda: _done(packed(input_ids=ids, use_cache=False).logits),
        "its layers are so small that calls count more than weights",
    )
    yield _wide_layer(report.scheme, run.device)


def _size(report: Report, plain: nn.Module) -> Row:
    dtype = str(next(plain.parameters()).dtype).removeprefix("torch.")
    return Row(
        what="bytes of the model",
        ours=f"{report.bytes_after / 2**20:.2f} MiB",
        plain=f"{report.bytes_before / 2**20:.2f} MiB",
        note=f"{report.coverage:.1%} of the parameters in {report.scheme.name},"
        f" {report.bits_per_weight:.3f} bits each; plain way: all in {dtype}",
    )


def _loss(run: Run, tour: Tour, packed: nn.Module) -> Row:
    before = float(tour.metrics["held_out_loss"])
    after = evaluate(packed, tour.data.held_out, run, run.settings(TrainSettings))
    if not abs(after - before) <= BOUND:
        raise ModelError(
            "six-bit weights change what the model says",
            why=f"its held-out loss went from {before:.4f} to {after:.4f} nats per token",
            fix="leave sensitive modules out with fp6.skip, or use smaller groups",
        )
    return Row(
        what="held-out loss, nats per token",
        ours=f"{after:.4f}",
        plain=f"{before:.4f}",
        note=f"{after - before:+.5f}; at most {BOUND:g} is let pass",
    )


def _folder(
    run: Run, tour: Tour, packed: nn.Module, chosen: tuple[str, int, tuple[str, ...]]
) -> Row:
    source, target = tour.folder / "model", tour.folder / "model-fp6"
    shutil.rmtree(target, ignore_errors=True)
    quantize_folder(source, target, *chosen)
    loaded: Any = load_model(target).to(run.device).eval()
    with torch.no_grad():
        ids = tour.data.held_out[:4].to(run.device)
        here = packed(input_ids=ids, use_cache=False).logits
        there = loaded(input_ids=ids, use_cache=False).logits
    if not torch.equal(here, there):
        raise ModelError(f"{target} is not the model that was quantized in memory")
    sizes = [sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (target, source)]
    ours, plain = (f"{size / 2**20:.2f} MiB" for size in sizes)
    note = "quantized tensor by tensor; its logits are those of the model in memory, bit for bit"
    return Row(what=f"weights in {target.name}", ours=ours, plain=plain, note=note)


def _speed(what: str, plain: Callable[[], object], ours: Callable[[], object], note: str) -> Row:
    with torch.no_grad():
        seconds = interleaved({"plain": plain, "ours": ours}, _ROUNDS, _SECONDS)
    times = {name: statistics.median(each) for name, each in seconds.items()}
    return Row(
        what=what,
        ours=f"{1 / times['ours']:,.0f} a second, {times['plain'] / times['ours']:.2f}x",
        plain=f"{1 / times['plain']:,.0f} a second",
        note=f"{note}; median of {len(seconds['ours'])} calls in turn",
    )


def _wide_layer(scheme: Scheme, device: torch.device) -> Row:
    """A layer as large as those of a model with seven billion parameters."""
    linear = torch.nn.Linear(_WIDE, _WIDE, bias=False, device=device)
    six = FP6Linear.from_linear(linear, scheme)
    x = torch.randn(1, _WIDE, device=device)
    return _speed(
        f"linear layer of {_WIDE} x {_WIDE}, one token",
        lambda: _done(linear(x)),
        lambda: _done(six(x)),
        f"plain way: float32; {torch.get_num_threads()} threads",
    )


def _done(result: Tensor) -> float:
    """Wait until a result is there, on a device that works by itself."""
    return float(result.flatten()[0])
