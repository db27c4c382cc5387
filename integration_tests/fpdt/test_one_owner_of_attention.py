"""The serving engine and layers in chunks are never on one model at once, and both one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import core
from core.distributed import Ranks
from core.engines import Sampling, generate
from core.testing import tiny

fpdt = pytest.importorskip("core_fpdt", reason="core-fpdt is not installed")
splitfuse = pytest.importorskip("core_splitfuse", reason="core-splitfuse is not installed")

PROMPTS = tiny.prompts(3)
GREEDY = Sampling(max_new_tokens=8)
SERVING: dict[str, Any] = {"engine": {"name": "splitfuse"}, "splitfuse": {"budget": 16}}
CHUNKS = {"chunk_tokens": 16, "strict": False}


def answers(engine: Any) -> list[tuple[int, ...]]:
    return [tuple(answer.ids) for answer in generate(engine, PROMPTS, GREEDY)]


def served(model: nn.Module) -> list[tuple[int, ...]]:
    with splitfuse.Engine(model, budget=16) as engine:
        return answers(engine)


def gradients(model: nn.Module) -> list[Tensor]:
    model.train().zero_grad()
    model(**tiny.batch(length=50), use_cache=False).loss.backward()
    found = [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]
    model.eval()
    return found


def require_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, two in zip(found, expected, strict=True):
        assert float((one - two).norm() / two.norm()) < 2e-6


def test_an_engine_is_refused_while_layers_run_in_chunks() -> None:
    model = tiny.llama()
    with fpdt.enable(model, **CHUNKS):
        with pytest.raises(core.EngineError) as refused:
            splitfuse.Engine(model, budget=16)
        assert "the attention of LlamaForCausalLM is taken" in str(refused.value)
        assert "core-fpdt has it" in str(refused.value)
        assert "core-splitfuse wants it" in str(refused.value)
        gradients(model)


def test_chunks_are_refused_while_an_engine_serves() -> None:
    model = tiny.llama()
    with splitfuse.Engine(model, budget=16) as engine:
        before = answers(engine)
        with pytest.raises(core.ModelError) as refused:
            fpdt.enable(model, **CHUNKS)
        assert "the attention of LlamaForCausalLM is taken" in str(refused.value)
        assert "core-splitfuse has it" in str(refused.value)
        assert answers(engine) == before


def test_one_after_the_other_and_back() -> None:
    model = tiny.llama()
    expected, tokens = gradients(tiny.llama()), served(tiny.llama())
    for _ in range(2):
        with fpdt.enable(model, **CHUNKS):
            require_close(gradients(model), expected)
        assert served(model) == tokens


def test_another_model_is_served_meanwhile() -> None:
    expected = served(tiny.llama(seed=1))
    with fpdt.enable(tiny.llama(), **CHUNKS):
        assert served(tiny.llama(seed=1)) == expected


def test_an_engine_that_nobody_closed_is_forgotten() -> None:
    model = tiny.llama()
    engine = splitfuse.Engine(model, budget=16)
    del engine
    with fpdt.enable(model, **CHUNKS):
        gradients(model)


def test_a_run_says_why_it_does_not_serve(tmp_path: Path) -> None:
    with core.start(
        folder=tmp_path, quiet=True, ranks=Ranks(), enable=["fpdt"], fpdt=CHUNKS, **SERVING
    ) as run:
        model = run.apply(core.MODEL, tiny.llama())
        with pytest.raises(core.EngineError, match=r"(?s)is taken.*core-fpdt has it"):
            run.engine(model)


def test_a_run_that_may_choose_serves_by_other_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = served(tiny.llama())
    with core.start(folder=tmp_path, ranks=Ranks(), enable=["fpdt"], fpdt=CHUNKS) as run:
        model = run.apply(core.MODEL, tiny.llama())
        engine = run.engine(model)
        assert answers(engine) == expected
        engine.close()
    assert "core-fpdt has it" in capsys.readouterr().err
    torch.testing.assert_close(model.lm_head.weight, tiny.llama().lm_head.weight)
