"""Which engine a run takes for a model, and how it hears of training."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import core
from core import EngineType, Hooks, hookimpl
from core.engines import Engine, Sampling, generate
from core.engines.plain import PlainEngine
from core.run import Run
from core.testing import tiny
from core.testing.fixtures import make_run, plugin_of

SAMPLING = Sampling(max_new_tokens=3)


class Fast(PlainEngine):
    """Serves models of one family and no other."""


def build(model: nn.Module, run: Run) -> Engine:
    if type(model).__name__ != "LlamaForCausalLM":
        raise core.EngineError(f"{type(model).__name__} is not served", why="no kernel for it")
    return Fast(model)


def build_any(model: nn.Module, run: Run) -> Engine:
    return Fast(model)


def only_llama(model: nn.Module) -> str:
    return "" if type(model).__name__ == "LlamaForCausalLM" else "it is no Llama"


class Refusing(Hooks):
    """Refuses while building."""

    @hookimpl
    def core_engines(self) -> Iterable[EngineType]:
        yield EngineType(name="fast", summary="Fast.", build=build, preference=9)


class Choosy(Hooks):
    """Says beforehand what it serves."""

    @hookimpl
    def core_engines(self) -> Iterable[EngineType]:
        yield EngineType(
            name="fast", summary="Fast.", build=build_any, preference=9, works=only_llama
        )


@pytest.mark.parametrize(
    ("plugin", "reason"), [(Refusing(), "no kernel for it"), (Choosy(), "it is no Llama")]
)
def test_auto_takes_the_next_engine_and_says_why(
    plugin: Hooks, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_run(tmp_path, plugins=plugin_of(plugin, "speedy")) as run:
        assert type(run.engine(tiny.llama())) is Fast
        capsys.readouterr()
        engine = run.engine(tiny.build("GPT2"))
        assert type(engine) is PlainEngine
        assert len(generate(engine, [[1, 2, 3]], SAMPLING)[0].ids) == 3
    told = capsys.readouterr().err
    assert "engine: plain" in told
    assert reason in told


@pytest.mark.parametrize("plugin", [Refusing(), Choosy()])
def test_a_named_engine_refuses_for_good(plugin: Hooks, tmp_path: Path) -> None:
    with make_run(tmp_path, plugins=plugin_of(plugin, "speedy")) as run:
        with pytest.raises(core.CoreError, match="no kernel for it|it is no Llama"):
            run.engine(tiny.build("GPT2"), "fast")
        assert type(run.engine(tiny.llama(), "fast")) is Fast


def test_every_refusal_is_listed_when_nothing_serves(tmp_path: Path) -> None:
    with (
        make_run(tmp_path, plugins=plugin_of(Refusing(), "speedy")) as run,
        pytest.raises(core.PluginError, match=r"(?s)Linear is not served.*causal language model"),
    ):
        run.engine(nn.Linear(2, 2))


def hooks() -> int:
    return len(torch_optimizer._global_optimizer_post_hooks)


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.tensor([[1, 2, 3, 4]])).logits.square().mean().backward()
    optimizer.step()


def test_steps_of_an_optimizer_raise_the_version(tmp_path: Path) -> None:
    model, stranger = tiny.llama(), tiny.llama()
    with make_run(tmp_path) as run:
        engine: Any = run.engine(model)
        before = engine.identity.salt()
        train(stranger)
        (first,) = generate(engine, [[1, 2, 3]], SAMPLING)
        assert (set(first.weights), engine.identity.salt()) == ({0}, before)
        train(model)
        train(model)
        (second,) = generate(engine, [[1, 2, 3]], SAMPLING)
        assert set(second.weights) == {2}
        assert engine.identity.salt() != before


def test_nothing_stays_after_an_engine_or_its_run(tmp_path: Path) -> None:
    model, before = tiny.llama(), hooks()
    with make_run(tmp_path) as run:
        engine: Any = run.engine(model)
        forgotten = weakref.ref(run.engine(model))
        gc.collect()
        assert forgotten() is None
        assert hooks() == before + 1
        engine.close()
        train(model)
    assert hooks() == before
    made = engine.identity.weights
    train(model)
    assert engine.identity.weights == made
