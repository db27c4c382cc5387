"""The serving engine beside other plugins: six-bit weights, training, checkpoints of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import core
from core.checkpoints import convert
from core.engines import Completion, Sampling, generate
from core.testing import tiny

pytest.importorskip("core_splitfuse", reason="core-splitfuse is not installed")

PROMPTS = tiny.prompts(5)
GREEDY = Sampling(max_new_tokens=12)
SETTINGS = {"engine": {"name": "splitfuse"}, "splitfuse": {"budget": 16}}


def by_transformers(model: Any) -> list[tuple[int, ...]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        found.append(tuple(out[0, len(prompt) :].tolist()))
    return found


def served(run: core.Run, model: nn.Module) -> list[Completion]:
    engine = run.engine(model)
    try:
        return generate(engine, PROMPTS, GREEDY)
    finally:
        engine.close()


def require_generate(answers: list[Completion], model: nn.Module) -> None:
    assert [answer.ids for answer in answers] == by_transformers(model)


@pytest.mark.parametrize("family", ["Llama", "Phi3", "Mixtral"])
def test_six_bit_weights_are_served(family: str, tmp_path: Path) -> None:
    fp6 = pytest.importorskip("core_fp6", reason="core-fp6 is not installed")
    plain = tiny.build(family, hidden_size=64, intermediate_size=128)
    with core.start(folder=tmp_path, quiet=True, **SETTINGS) as run:
        before = [answer.ids for answer in served(run, plain)]
        report = fp6.quantize(plain, "e2m3", 32)
        assert report.coverage > 0.5
        answers = served(run, plain)
    require_generate(answers, plain)
    assert [answer.ids for answer in answers] != before


def losses(model: nn.Module, tmp_path: Path, *, serving: bool) -> list[Tensor]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    found: list[Tensor] = []
    with core.start(folder=tmp_path, quiet=True, **SETTINGS) as run:
        engine = run.engine(model) if serving else None
        for step in range(3):
            if engine is not None:
                answers = generate(engine, PROMPTS, GREEDY)
                require_generate(answers, model.eval())
                model.train()
                assert {version for answer in answers for version in answer.weights} == {step}
            loss: Tensor = model(**tiny.batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        if engine is not None:
            engine.close()
    return found


def test_training_goes_on_as_if_nothing_was_served(tmp_path: Path) -> None:
    model = tiny.llama().train()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    served_between = losses(model, tmp_path / "a", serving=True)
    alone = losses(tiny.llama().train(), tmp_path / "b", serving=False)
    assert all(torch.equal(a, b) for a, b in zip(served_between, alone, strict=True))
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_a_checkpoint_of_torch_is_restored_and_served(tmp_path: Path) -> None:
    """What torch's own DCP has saved, as a folder of transformers, through core-ucp."""
    pytest.importorskip("core_ucp", reason="core-ucp is not installed")
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM

    model: Any = tiny.qwen3()
    foreign, restored = tmp_path / "foreign", tmp_path / "restored"
    dcp.save({"model": model.state_dict()}, checkpoint_id=str(foreign))
    model.config.save_pretrained(tmp_path / "config")
    ucp = {"config": str(tmp_path / "config")}
    with core.start(folder=tmp_path / "run", quiet=True, ucp=ucp, **SETTINGS) as run:
        convert.execute(convert.plan(foreign, restored, "huggingface", run))
        answers = served(run, AutoModelForCausalLM.from_pretrained(restored))
    require_generate(answers, model)
