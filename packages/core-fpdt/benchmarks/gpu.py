"""Long sequences on one GPU: kernels of blocks, one layer of growing length, a whole model.

Kernels are timed on blocks of bfloat16 as they come up in a row, and their gradients from the
log-sum-exp of two blocks are compared with float32. A layer runs forwards and backwards with its
chunks in host memory, and again with all of them on the device where they fit: what is slower then,
as a share of the time that the copies alone would take, was not hidden. A model is one training step
without the optimizer, its utilization counted in both ways that are in use::

    python packages/core-fpdt/benchmarks/gpu.py --json gpu.json
    python packages/core-fpdt/benchmarks/gpu.py --part layer --length 1M --length 2M --no-resident
    python packages/core-fpdt/benchmarks/gpu.py --device cpu --tiny
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from core.cli.table import as_text, echo_table
from core.errors import CoreError
from core_fpdt import enable
from core_fpdt.kernels.choosing import KERNELS
from core_fpdt.kernels.contract import Gradients, Kernel, Scores
from core_fpdt.kernels.merging import accumulate
from core_fpdt.kernels.reference import REFERENCE
from core_fpdt.masks.tiles import Kind, Tile
from core_fpdt.measuring.meter import Meter
from core_fpdt.planning.flops import attention, logged_flops, model_flops, products
from core_fpdt.planning.hardware import HARDWARE
from core_fpdt.planning.shape import ModelShape
from core_fpdt.planning.units import parse_tokens

GIB = 2**30
EIGHT_BILLION = ModelShape(
    name="8B",
    layers=32,
    hidden=4096,
    heads=32,
    key_heads=8,
    head_dim=128,
    intermediate=14336,
    vocabulary=128256,
)
TINY = ModelShape(
    name="tiny",
    layers=2,
    hidden=32,
    heads=4,
    key_heads=2,
    head_dim=8,
    intermediate=48,
    vocabulary=96,
)
PARTS = "kernels", "layer", "model"
DEFAULTS = {
    False: {"kernels": "8K 16K 32K 64K", "layer": "256K 512K 1M", "model": "256K"},
    True: {"kernels": "32", "layer": "64 128", "model": "64"},
}
"""Tokens of the parts; for tests in the second line."""
CHECKED = 4096
"""Tokens of blocks whose gradients are compared, at most."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all parts need.

    Args:
        device: where it is measured.
        tiny: sizes for a test.
        chunk: tokens of a chunk; 0 is the default.
        resident: measure without offloading, too.
        shared: all layers of the model have the weights of the first one.
        keep_keys: as in the settings.
        peak: FLOP/s that the device has at most, if it is known.
    """

    device: torch.device
    tiny: bool
    chunk: int
    resident: bool
    shared: bool
    keep_keys: bool
    peak: float | None

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return TINY if self.tiny else EIGHT_BILLION

    def seconds(self, call: Callable[[], object], repeats: int = 1) -> float:
        """Median time of a call, on the device."""
        times = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def wait(self) -> None:
        """Until everything that was asked for is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def copied(self) -> float:
        """Bytes per second between host and device, one way."""
        size = 2**20 if self.tiny else 2**28
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        there.copy_(host)
        return size / self.seconds(lambda: there.copy_(host, non_blocking=True), 5)

    def peak_bytes(self, call: Callable[[], object]) -> tuple[float, int]:
        """Seconds of a call and the most bytes of the device while it ran."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            seconds = self.seconds(call)
            return seconds, torch.cuda.max_memory_allocated(self.device)
        with Meter() as meter:
            seconds = self.seconds(call)
        return seconds, meter.peak


def kernels(bench: Bench, tokens: int) -> Iterator[Row]:
    """Kernels on square blocks, forwards and backwards."""
    shape = bench.shape
    generator = torch.Generator(bench.device).manual_seed(0)

    def draw(heads: int, length: int) -> Tensor:
        size = 1, heads, length, shape.head_dim
        return torch.randn(size, generator=generator, device=bench.device, dtype=torch.bfloat16)

    scores = Scores(shape.head_dim**-0.5)
    for kind in (Kind.FULL, Kind.CAUSAL):
        query, grad = draw(shape.heads, tokens), draw(shape.heads, tokens)
        key, value = draw(shape.key_heads, tokens), draw(shape.key_heads, tokens)
        tile = Tile(kind, (0, tokens), (0, tokens))
        flops = 4.0 * tokens**2 * shape.query_width / (2 if kind is Kind.CAUSAL else 1)
        for kernel in KERNELS.values():
            row: Row = {"kernel": kernel.name, "tile": kind.value, "tokens": tokens}
            if why := kernel.works(query, key, value, tile, scores):
                yield {**row, "why": why}
                continue
            if kernel is REFERENCE and not bench.tiny:
                continue
            part = kernel.forward(query, key, value, tile, scores)
            ends = grad, query, key, value, part.output.to(query.dtype), part.lse, tile, scores
            kernel.backward(*ends)
            one = bench.seconds(lambda: kernel.forward(query, key, value, tile, scores), 5)
            two = bench.seconds(lambda: kernel.backward(*ends), 5)
            few = min(tokens, CHECKED)
            cut = [x[:, :, :few] for x in (grad, query, key, value)]
            yield {
                **row,
                "forward TFLOP/s": flops / one / 1e12,
                "backward TFLOP/s": 2.5 * flops / two / 1e12,
                "error": _error(kernel, kind, cut, scores),
            }


def _error(kernel: Kernel, kind: Kind, cut: list[Tensor], scores: Scores) -> float:
    """Relative error of gradients of a row of two blocks against float32."""
    exact = _row_of_two(REFERENCE, kind, [x.float() for x in cut], scores)
    found = _row_of_two(kernel, kind, cut, scores)
    pairs = list(zip(found, exact, strict=True))
    return max(float((x.float() - y).norm() / y.norm()) for x, y in pairs)


def _row_of_two(kernel: Kernel, kind: Kind, cut: list[Tensor], scores: Scores) -> Gradients:
    """A block that is seen by all queries, then one of a kind: the gradients of the second."""
    grad, query, key, value = cut
    length = query.shape[2]
    ranges = (length, 2 * length), (0, length)
    inputs = query, key, value
    before = Tile(Kind.FULL, *ranges), scores
    after = Tile(kind, ranges[0], ranges[0]), scores
    # The first block has the same keys backwards: other weights for every query.
    first = accumulate(kernel, None, query, key.flip(2), value.flip(2), *before)
    merged = accumulate(kernel, first, *inputs, *after)
    return kernel.backward(grad, *inputs, merged.output.to(query.dtype), merged.lse, *after)


def built(bench: Bench, layers: int, length: int, vocabulary: int) -> nn.Module:
    """A Llama of random weights in bfloat16, on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = bench.shape
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
    )
    with torch.device(bench.device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if bench.shared:
        first, *others = model.model.layers
        for other in others:
            for name, module in other.named_modules():
                for key in list(module._parameters):
                    setattr(module, key, getattr(first.get_submodule(name), key))
    return model.train()


def layer(bench: Bench, length: int) -> Iterator[Row]:
    """One layer with its final norm, forwards and backwards."""
    shape = replace(bench.shape, layers=1)
    model = built(bench, 1, length, 32)
    size = 1, length, shape.hidden
    hidden = torch.randn(size, device=bench.device, dtype=torch.bfloat16, requires_grad=True)

    def step(tokens: int = length) -> None:
        output = model.model(inputs_embeds=hidden[:, :tokens], use_cache=False).last_hidden_state
        output.backward(output.new_ones(()).expand_as(output))
        model.zero_grad()
        hidden.grad = None

    row: Row = {"length": length}
    times: dict[str, float] = {}
    flops = 3.5 * attention(shape, length) + 4 * 2.0 * shape.layer_parameters * length
    for offload in ("host", *(["none"] if bench.resident else [])):
        settings: dict[str, Any] = {"offload": offload, "keep_keys": bench.keep_keys}
        if bench.tiny and offload == "host":
            settings["delay"] = 1e-6  # what stands for a device on CPUs
        with enable(model, chunk_tokens=bench.chunk, strict=False, **settings) as enabled:
            try:
                step(min(length, 2 * enabled.settings.chunk_tokens))
                counters: Any = enabled.runner.store.counters  # of every store that offloads
                before = counters.put + counters.fetched
                times[offload], peak = bench.peak_bytes(step)
            except torch.OutOfMemoryError:
                row[f"{offload} seconds"] = "out of memory"
                continue
            row[f"{offload} seconds"] = times[offload]
            row[f"{offload} device GiB"] = peak / GIB
            if offload == "host":
                moved = counters.put + counters.fetched - before
                row["host GiB"], row["moved GiB"] = counters.peak / GIB, moved / GIB
                row["executed TFLOP/s"] = flops / times[offload] / 1e12
                row["copy seconds"] = moved / bench.copied()
    if len(times) == 2 and row["moved GiB"]:
        row["overlap"] = 1 - (times["host"] - times["none"]) / row["copy seconds"]
    yield row


def model(bench: Bench, length: int) -> Iterator[Row]:
    """A training step of the whole model without its optimizer."""
    shape = bench.shape
    whole = built(bench, shape.layers, length, shape.vocabulary)
    ids = torch.randint(shape.vocabulary, (1, length), device=bench.device)

    def step(tokens: int = length) -> None:
        batch = ids[:, :tokens]
        whole(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        whole.zero_grad()

    settings = {"chunk_tokens": bench.chunk, "keep_keys": bench.keep_keys, "strict": False}
    with enable(whole, **settings) as enabled:
        step(min(length, 2 * enabled.settings.chunk_tokens))
        seconds, peak = bench.peak_bytes(step)
    row: Row = {"length": length, "seconds": seconds, "device GiB": peak / GIB}
    row["attention share"] = attention(shape, length) / (
        attention(shape, length) + products(shape, length)
    )
    if bench.peak is not None:
        # As in PaLM, with causal attention as one half; and as Megatron-DeepSpeed's log has it.
        row["MFU"] = model_flops(shape, length) / seconds / bench.peak
        row["logged MFU"] = logged_flops(shape, length) / seconds / bench.peak
    yield row


@click.command(help=__doc__)
@click.option("--part", multiple=True, type=click.Choice(PARTS), help="All of them by default.")
@click.option("--length", multiple=True, metavar="TOKENS", help="Instead of those of the part.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="Sizes for a test.")
@click.option("--chunk-tokens", type=click.IntRange(0), default=0, help="As in the settings.")
@click.option("--keep-keys/--project-keys", default=True, help="As in the settings.")
@click.option("--resident/--no-resident", default=True, help="Time layers without offloading, too.")
@click.option("--share-weights", is_flag=True, help="All layers have the weights of the first.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE")
def main(
    part: tuple[str, ...],
    length: tuple[str, ...],
    device: str,
    tiny: bool,
    chunk_tokens: int,
    keep_keys: bool,
    resident: bool,
    share_weights: bool,
    file: Path | None,
) -> None:
    """Measure, print tables, and keep what is known after every row."""
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device; try --device cpu --tiny")
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    chunk = chunk_tokens or (16 if tiny else 0)
    bench = Bench(where, tiny, chunk, resident, share_weights, keep_keys, _peak(name))
    found: dict[str, Any] = {"device": name, "torch": torch.__version__, "shape": bench.shape.name}
    parts: dict[str, Callable[[Bench, int], Iterator[Row]]] = {
        "kernels": kernels,
        "layer": layer,
        "model": model,
    }
    for chosen in part or PARTS:
        rows: list[Row] = found.setdefault(chosen, [])
        for text in length or DEFAULTS[tiny][chosen].split():
            click.echo(f"{chosen}, {text} tokens", err=True)
            with ExitStack() as stack:
                stack.callback(_free, where)
                try:
                    for row in parts[chosen](bench, parse_tokens(text)):
                        rows.append(row)
                        _write(file, found)
                except (CoreError, torch.OutOfMemoryError) as error:
                    rows.append({"length": text, "why": str(error).splitlines()[0]})
                    _write(file, found)
        _show(chosen, rows)


def _peak(name: str) -> float | None:
    known = [each.flops for each in HARDWARE.values() if each.name in name.lower()]
    return known[0] if known else None


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _write(file: Path | None, found: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _show(title: str, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    click.echo(f"\n{title}")
    echo_table(columns, [[_text(row.get(key)) for key in columns] for row in rows])


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else as_text(value)


if __name__ == "__main__":
    main()
