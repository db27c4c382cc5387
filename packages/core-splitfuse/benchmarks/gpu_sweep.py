"""A model of the shape of Llama-2 7B on one GPU: the client sweeps of the paper, and decodes alone.

Weights are random, for speed does not depend on values. Clients wait for one answer before they ask
again; lengths are normal around 2600 + 60 and 1200 + 128 tokens (DeepSpeed-FastGen, arXiv
2401.08671, section 4). The floor of a decode step is the time in which a copy moves the bytes of
the weights, and of the keys and values that it reads.

    python benchmarks/gpu_sweep.py [--clients 1 4 ...] [--seconds 400] [--json PATH]
    python benchmarks/gpu_sweep.py --device cpu --tiny
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from core.engines import Request, Sampling
from core_splitfuse.benchmarking.clock import Clock
from core_splitfuse.benchmarking.driver import drive
from core_splitfuse.benchmarking.figures import figures
from core_splitfuse.benchmarking.peers.continuous import continuous
from core_splitfuse.benchmarking.peers.ours import prefill_first, splitfuse
from core_splitfuse.benchmarking.peers.peer import Peer
from core_splitfuse.benchmarking.subject import Subject
from core_splitfuse.benchmarking.workload import Lengths, closed
from core_splitfuse.settings import SplitFuseSettings

SEVEN_B: Final = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
}
TINY: Final = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
BATCHES: Final = (1, 4, 8, 16, 32)
PEAK_CLIENTS: Final = 16
"""Clients with which transformers is measured; it takes long."""


@dataclass(frozen=True)
class Shared(Subject):
    """One model for everybody, made where it computes: a copy for each would not fit."""

    def build(self) -> nn.Module:
        return _built(tuple(self.shape.items()), self.dtype, self.device, self.seed)


@functools.cache
def _built(shape: tuple[tuple[str, int], ...], dtype: str, device: str, seed: int) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    fields: dict[str, Any] = dict(shape)
    ends = {"eos_token_id": None, "bos_token_id": 1, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(**fields, **ends, dtype=getattr(torch, dtype))
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()  # type: ignore[no-any-return]


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(2**32 if device == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return 2 * source.nbytes / min(times)


def decode_steps(
    subject: Shared, settings: SplitFuseSettings, bandwidth: float, prompt: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Steps in which every sequence gets one token, against their floor."""
    shape = subject.shape
    model: Any = subject.build()
    table = model.get_input_embeddings().weight
    weights = sum(p.nbytes for p in model.parameters()) - table.nbytes
    width = shape["hidden_size"] // shape["num_attention_heads"] * shape["num_key_value_heads"]
    per_token = 2 * shape["num_hidden_layers"] * width * table.element_size()
    peer = splitfuse(settings)
    engine = peer.open(subject).engine
    for batch in BATCHES:
        # The first ones go on until the prompt of the last one is computed.
        waiting = batch * prompt // (settings.budget - batch)
        sampling = Sampling(max_new_tokens=steps + waiting + 8)
        for first in range(batch):
            ids = [(first * 31 + i) % (shape["vocab_size"] - 3) + 3 for i in range(prompt)]
            engine.add(Request(prompt=ids, sampling=sampling))
        times: list[float] = []
        while engine.busy:
            synchronize(subject.device)
            begin = time.perf_counter()
            made = engine.step()
            synchronize(subject.device)
            if len(made) == batch and all(token.finish is None for token in made):
                times.append(time.perf_counter() - begin)
        took = statistics.median(times[2:])
        floor = (weights + batch * (prompt + steps / 2 + waiting / 2) * per_token) / bandwidth
        row = {"batch": batch, "milliseconds": took * 1000, "floor": floor * 1000}
        yield {**row, "share": floor / took, "weight_floor": weights / bandwidth * 1000}
    engine.close()


def sweep(
    subject: Shared, peers: Mapping[Peer, list[int]], lengths: list[Lengths], ends: float
) -> Iterator[dict[str, Any]]:
    """Figures of every peer with its numbers of clients, until the time is over."""
    for one in lengths:
        for peer, numbers in peers.items():
            opened = None
            for clients in numbers:
                row = {
                    "load": f"p{one.prompt} g{one.answer}",
                    "name": peer.name,
                    "clients": clients,
                }
                if time.monotonic() > ends:
                    yield {**row, "left_out": "the time was over"}
                    continue
                try:
                    opened = opened or peer.open(subject)
                    load = closed(one, 2 * clients + 16, clients, subject.vocabulary, seed=clients)
                    records = drive(opened.engine, load, Clock(opened.seconds))
                except Exception as problem:
                    yield {**row, "left_out": f"{type(problem).__name__}: {problem}"[:200]}
                    break
                yield {**row, **_as_json(figures(records))}
            if opened is not None:
                opened.engine.close()
            opened = None  # its memory is for the next one
            gc.collect()
            if subject.device == "cuda":
                torch.cuda.empty_cache()


def _as_json(found: Any) -> dict[str, Any]:
    return {
        str(name): {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
        for name, value in asdict(found).items()
    }


def print_row(row: Mapping[str, Any]) -> None:
    """One line of the sweep."""
    head = f"{row['load']:12} {row['name']:22} {row['clients']:3}"
    if "left_out" in row:
        print(f"{head} left out: {row['left_out']}")
        return
    values = {key: value for key, value in row.items() if isinstance(value, float)}
    print(f"{head} " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--clients", type=int, nargs="+")
    parser.add_argument("--budget", type=int, default=768, help="tokens of a pass")
    parser.add_argument("--seconds", type=float, default=400, help="begin no run after that")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing can be measured here", file=sys.stderr)
        return 2
    ends = time.monotonic() + chosen.seconds
    tiny = chosen.tiny
    dtype = "float32" if tiny else "bfloat16"
    subject = Shared(TINY if tiny else SEVEN_B, dtype, chosen.device)
    block = 16 if chosen.device == "cpu" else 64
    tokens = 4096 if tiny else 131072
    settings = SplitFuseSettings(
        budget=64 if tiny else chosen.budget, kv_tokens=tokens, block_size=block, prefix_cache=False
    )
    lengths = [Lengths(60, 8)] if tiny else [Lengths(2600, 60), Lengths(1200, 128)]
    clients = chosen.clients or ([1, 2] if tiny else [1, 4, 8, 16, 24, 32])
    bandwidth = copy_bandwidth(chosen.device)
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else "CPU"
    print(f"{name}: a copy moves {bandwidth / 1e12:.3f} TB/s")
    decodes: list[dict[str, Any]] = []
    for row in decode_steps(subject, settings, bandwidth, 24 if tiny else 512, 6 if tiny else 40):
        decodes.append(row)
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    peers = {
        splitfuse(settings): clients,
        prefill_first(settings): clients,
        continuous(64 if tiny else 768, tokens=tokens): [clients[-1] if tiny else PEAK_CLIENTS],
    }
    rows: list[dict[str, Any]] = []
    for row in sweep(subject, peers, lengths, ends):
        rows.append(row)
        print_row(row)
    if chosen.json:
        content = {"device": name, "torch": torch.__version__, "copy": bandwidth}
        content |= {"shape": dict(subject.shape), "decodes": decodes, "rows": rows}
        chosen.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
