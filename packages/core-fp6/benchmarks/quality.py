"""What six bits cost: error of random weights, and divergence of a small model trained here.

Trains a byte-level Llama on the standard library's sources, on one thread in well under a minute,
and compares all variants on files it has not seen. Everything is seeded.

    python benchmarks/quality.py [--steps 300] [--json] [--plot quality.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from core.cli.table import echo_table
from core.recipes.corpus import STDLIB, cut, documents, split
from core_fp6.quality.calibration import Calibration, calibrate
from core_fp6.quality.comparing import DEFAULT, Comparison, compare, plot, variant

ERRORS = (
    *("e3m2-row", "e3m2-row-search", "e3m2-g128", "e3m2-g128-search"),
    *("e2m3-row", "e2m3-g128", "e2m3-g128-search", "mxfp6-e3m2", "mxfp6-e2m3"),
    *("int6-row", "int6-g128", "int4-g128-asym", "nf4-g64", "int8-row", "fp8-e4m3-row"),
)
_LENGTH = 256


@dataclass(frozen=True)
class Toy:
    """A trained model, text to calibrate with, and text that it has not seen."""

    model: LlamaForCausalLM
    training: Tensor
    held_out: Tensor

    def calibrated(self) -> Calibration:
        """Statistics of 16 sequences that it was trained on."""
        return calibrate(self.model, self.training[:16], batch_size=8)


def train(steps: int = 300, seed: int = 0) -> Toy:
    """A Llama of half a million parameters over bytes, trained on the standard library."""
    torch.manual_seed(seed)
    seen, unseen = split(documents([STDLIB], seed), 0.05)
    training, held_out = _bytes(cut(seen, 2_000_000)), _bytes(cut(unseen, 100_000))[:32]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_LENGTH,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = training[torch.randint(len(training), (8,))]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return Toy(model.eval(), training, held_out)


def weights(rows: int = 512, columns: int = 4096, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Random weights of light and heavy tails, and with a few large columns."""
    torch.manual_seed(seed)
    yield "gauss", torch.randn(rows, columns)
    yield "laplace", torch.distributions.Laplace(0.0, 1.0).sample((rows, columns))
    yield "t(4)", torch.distributions.StudentT(4.0).sample((rows, columns))
    yield "t(3)", torch.distributions.StudentT(3.0).sample((rows, columns))
    uneven = torch.randn(rows, columns)
    uneven[:, torch.randperm(columns)[:8]] *= 20
    yield "8 columns x20", uneven


def error(name: str, weight: Tensor) -> float:
    """Norm of what a variant takes off a weight, over the norm of the weight."""
    return float((variant(name).rounded(weight, None) - weight).norm() / weight.norm())


def errors() -> dict[str, dict[str, float]]:
    """Relative errors by variant and kind of weight."""
    kinds = dict(weights())
    return {
        name: {kind: error(name, weight) for kind, weight in kinds.items()}
        for name in ERRORS
        if variant(name).missing(calibrated=False) is None
    }


def _bytes(texts: list[str]) -> Tensor:
    flat = torch.frombuffer(bytearray("\n".join(texts).encode()), dtype=torch.uint8).long()
    whole = len(flat) // _LENGTH * _LENGTH
    return flat[:whole].view(-1, _LENGTH)


def _show(found: dict[str, dict[str, float]], comparison: Comparison) -> None:
    kinds = list(next(iter(found.values())))
    print("relative error of weights, in %")
    rows = [[name, *(f"{100 * of[kind]:.2f}" for kind in kinds)] for name, of in found.items()]
    echo_table(["", *kinds], rows)
    print()
    comparison.print()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    toy = train(asked.steps)
    names = (
        *DEFAULT,
        "e3m2-row-search",
        "e3m2-row-calibrated",
        "e3m2-g128-search",
        "e3m2-g128-calibrated",
    )
    comparison = compare(
        toy.model, toy.held_out, variants=names, calibration=toy.calibrated(), batch_size=8
    )
    found = errors()
    if asked.plot:
        plot(comparison, asked.plot)
    if asked.json:
        everything: dict[str, Any] = {"errors": found, "comparison": comparison.as_dict()}
        print(json.dumps(everything, indent=2))
    else:
        _show(found, comparison)


if __name__ == "__main__":
    main()
