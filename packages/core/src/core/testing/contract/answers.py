"""What transformers itself answers: the reference that engines are held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from core.testing import tiny

NEW = 16
"""Tokens of every answer."""

Ids = list[int]

_MARGIN = 1e-2


def reference(build: Callable[..., nn.Module], prompt: Ids, *, seed: int = 0) -> Ids:
    """What transformers generates greedily with a model that no engine has touched."""
    return list(_reference(build, tuple(prompt), seed))


@cache
def _reference(build: Callable[..., nn.Module], prompt: tuple[int, ...], seed: int) -> Ids:
    model: Any = build(seed=seed)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    return [int(i) for i in made[0, len(prompt) :]]


@cache
def prompts_for(build: Callable[..., nn.Module]) -> list[Ids]:
    """Prompts with clear greedy answers: no near tie that another order of sums may flip."""
    found: list[Ids] = []
    for seed in range(100):
        for prompt in tiny.prompts(seed=seed)[len(found) :]:
            if not _is_clear(build, prompt):
                break
            found.append(prompt)
        if len(found) == len(tiny.prompts()):
            return found
    raise AssertionError(f"no clear prompts for {build.__name__}")


def _is_clear(build: Callable[..., nn.Module], prompt: Ids) -> bool:
    model, answer = build(), reference(build, prompt)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    return bool((best[:, 0] - best[:, 1] > _MARGIN).all()) and len(set(answer)) > 10
