"""What DeepSpeed has saved goes through core-ucp into a model that core-splitfuse serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ucp.deepspeed_cases import CASES
from ucp.deepspeed_models import VOCABULARY, build
from ucp.deepspeed_runs import Lab

import core
from core.engines import Sampling, generate

pytest.importorskip("core_splitfuse", reason="core-splitfuse is not installed")


@pytest.mark.parametrize("name", ["zero1-gpt2", "zero1-autotp"])
def test_a_restored_decoder_answers_as_its_own_generate(
    name: str, lab: Lab, tmp_path: Path
) -> None:
    case = CASES[name]
    torch.manual_seed(5)
    model: Any = build(case)
    fresh = next(model.decoder.parameters()).clone()
    drawn = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCABULARY, (n,), generator=drawn).tolist() for n in (2, 5, 8)]
    engine = {"engine": {"name": "splitfuse"}, "splitfuse": {"budget": 8}}
    with core.start(folder=tmp_path, quiet=True, **engine) as run:
        run.load({"model": model}, lab.saved(case).folder)
        served = run.engine(model.decoder)
        answers = generate(served, prompts, Sampling(max_new_tokens=8))
        served.close()
    assert not torch.equal(fresh, next(model.decoder.parameters()))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        made = model.decoder.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(answer.ids) == made[0, len(prompt) :].tolist()
