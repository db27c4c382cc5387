"""What formats do to the predictions of a model that was trained for some seconds."""

from __future__ import annotations

import math
from statistics import mean

import pytest
import torch

from core_fp6.quality.comparing import compare

NAMES = "e2m3-g128", "e2m3-g128-search", "e3m2-row", "fp8-e4m3-row"
ROUNDINGS = 8


@pytest.fixture(scope="module")
def divergences(toy):
    """Divergence by variant, once for each of some models that differ a little.

    How errors of rounding fall is chance: one model alone says little about formats this close.
    """
    found = {name: [] for name in NAMES}
    trained = {name: p.detach().clone() for name, p in toy.model.named_parameters()}
    for seed in range(ROUNDINGS):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in toy.model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(trained[name] * (1 + 0.05 * noise))
        for score in compare(toy.model, toy.held_out[:8], variants=NAMES, batch_size=8).scores:
            found[score.variant].append(score.kl)
    with torch.no_grad():
        for name, parameter in toy.model.named_parameters():
            parameter.copy_(trained[name])
    return found


def ratio(ours, theirs):
    """Geometric mean over the models."""
    return math.exp(mean(math.log(a / b) for a, b in zip(ours, theirs, strict=True)))


def test_six_bits_with_groups_are_as_good_as_eight_bits_with_rows(divergences):
    eight = divergences["fp8-e4m3-row"]
    assert ratio(divergences["e2m3-g128-search"], eight) <= 1.1
    # Rounding to nearest is 0.97 and 1.12 for two models: chance is given some room.
    assert ratio(divergences["e2m3-g128"], eight) <= 1.25


def test_the_papers_format_diverges_several_times_as_far(divergences):
    assert 2 <= ratio(divergences["e3m2-row"], divergences["e2m3-g128"]) <= 10


def test_searching_scales_helps(divergences):
    assert ratio(divergences["e2m3-g128-search"], divergences["e2m3-g128"]) < 0.95


def test_four_bits_diverge_ten_times_as_far(toy):
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    names = "e2m3-g128", "int8-row", "int4-g128-asym", "nf4-g64"
    scores = compare(toy.model, toy.held_out[:8], variants=names, batch_size=8).scores
    six, eight, four, normal = (score.kl for score in scores)
    assert eight < six / 4
    assert min(four, normal) > 8 * six
