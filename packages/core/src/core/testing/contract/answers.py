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
    return list(_reference(build, tuple(prompt), seed)[0])


@cache
def _reference(
    build: Callable[..., nn.Module], prompt: tuple[int, ...], seed: int
) -> tuple[Ids, float]:
    """The answer, and the smallest lead of a chosen token over the second best."""
    model: Any = build(seed=seed)
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    # The logits of every step itself: those of the whole text may have other frequencies.
    best = torch.cat(made.logits).topk(2).values
    answer = [int(i) for i in made.sequences[0, len(prompt) :]]
    return answer, float((best[:, 0] - best[:, 1]).min())


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
    answer, lead = _reference(build, tuple(prompt), 0)
    return lead > _MARGIN and len(set(answer)) > 10
