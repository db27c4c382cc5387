"""Optimizers and their learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from core.recipes.settings import TrainSettings


def build_optimizers(model: nn.Module, wanted: TrainSettings) -> dict[str, Optimizer]:
    """Build the optimizers of a model by name.

    AdamW decays matrices only. Muon takes the matrices of the layers, and leaves embeddings, output
    head and vectors to AdamW (Jordan et al., 2024).
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    muon = {n: p for n, p in trained.items() if wanted.optimizer == "muon" and _hidden(n, p)}
    rest = [p for n, p in trained.items() if n not in muon]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": wanted.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    found: dict[str, Optimizer] = {
        "adamw": torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=wanted.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
    }
    if muon:
        found["muon"] = torch.optim.Muon(
            list(muon.values()), lr=wanted.muon_learning_rate, weight_decay=wanted.weight_decay
        )
    return found


def build_schedulers(
    optimizers: Mapping[str, Optimizer], wanted: TrainSettings
) -> dict[str, LambdaLR]:
    """One warm-up and cosine schedule for each optimizer, named ``<optimizer>_schedule``."""

    def factor(step: int) -> float:
        return learning_rate_factor(step, wanted)

    return {f"{n}_schedule": LambdaLR(optimizer, factor) for n, optimizer in optimizers.items()}


def learning_rate_factor(step: int, wanted: TrainSettings) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine."""
    if step < wanted.warmup_steps:
        return (step + 1) / (wanted.warmup_steps + 1)
    done = (step - wanted.warmup_steps) / max(1, wanted.steps - wanted.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return wanted.final_learning_rate + (1 - wanted.final_learning_rate) * cosine


def _hidden(name: str, parameter: Any) -> bool:
    return parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
