"""The checkpoints that the matrix begins with: one for every kind of source, by its real writer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from ucp.deepspeed_cases import CASES
from workspace import ROOT

import core
from core.checkpoints import convert

TESTS = ROOT / "packages/core-ucp/tests/sources"
_EVERY = ("fsdp2", "rank_files", "accelerated")


class Makers:
    """Makes checkpoints, or finds those that another row has made.

    Args:
        scratch: a folder for them.
        lab: gives what runs DeepSpeed; asked only by rows that need it.
    """

    def __init__(self, scratch: Path, lab: Callable[[], Any]) -> None:
        self._scratch = scratch
        self._lab = lab

    def deepspeed(self, case: str) -> Path:
        """What DeepSpeed has saved."""
        return Path(self._lab().saved(CASES[case]).folder)

    def deepspeed_universal(self, case: str) -> Path:
        """What DeepSpeed's own converter makes of it."""
        return Path(self._lab().universal(CASES[case]))

    def ranks(self, case: str) -> Path:
        """What ranks of torch or accelerate have saved."""
        folder = self._scratch / "torch"
        if not (folder / case).exists():
            # One process for those of every run: it takes longer to begin than to save.
            _process(TESTS / "makers.py", str(folder), *(_EVERY if case in _EVERY else (case,)))
        return folder / case / "checkpoint"

    def megatron(self) -> Path:
        """What two tensor-parallel ranks of Megatron-core have saved."""
        pytest.importorskip("megatron.core")
        folder = self._scratch / "megatron"
        _process(Path(__file__).with_name("megatron_runs.py"), "save", str(folder))
        return folder

    def megatron_legacy(self) -> Path:
        """Files of two tensor-parallel ranks in each of two pipeline stages."""
        folder = self._scratch / "mp_rank"
        folder.mkdir()
        _module(TESTS / "test_megatron_legacy.py").written(folder, 2, 2)
        return folder

    @cached_property
    def core(self) -> Path:
        """What ``run.save`` leaves: weights, buffers, an optimizer, a schedule, random numbers."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))
        optimizer = torch.optim.AdamW(_groups(model), lr=0.1, betas=(0.8, 0.9))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        _train(model, optimizer, 4)
        schedule.step()
        state = {"model": model, "optim": optimizer, "scheduler": schedule, "epoch": 7}
        form = {"format": "dcp"}
        with core.start(folder=self._scratch / "core", quiet=True, checkpoint=form) as run:
            return run.save(state, 3).durable()

    def whole(self) -> Path:
        """One ``torch.save``; the last weight is the first one."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        model[2].weight = model[0].weight
        optimizer = torch.optim.AdamW(_groups(model), lr=0.1)
        _train(model, optimizer, 4)
        path = self._scratch / "run.pt"
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7}
        torch.save(state, path)
        return path

    def huggingface(self) -> Path:
        """What ``save_pretrained`` leaves."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        LlamaForCausalLM(config).save_pretrained(self._scratch / "huggingface")
        return self._scratch / "huggingface"

    def universal(self) -> Path:
        """A universal folder, which remembers what it was made of."""
        folder = self._scratch / "universal"
        with core.start(folder=self._scratch / "core", quiet=True) as run:
            convert.execute(convert.plan(self.core, folder, "universal", run))
        return folder


@dataclass(frozen=True)
class Row:
    """A kind of source.

    Attributes:
        title: what the page calls it.
        make: gives the path of a checkpoint.
        nightly: whether it is too slow for every run of the tests.
        settings: what DeepSpeed targets ask for, where the source does not tell.
    """

    title: str
    make: Callable[[Makers], Path]
    nightly: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


NETS = {"buffers": ["scale"]}
"""Buffers of the model of the torch cases."""
NORMS = {"buffers": ["1.running_mean", "1.running_var"]}
"""Buffers of the model of core's runs."""
ORDER = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in (
            *(f"self_attn.{which}_proj" for which in "qkvo"),
            *(f"mlp.{which}_proj" for which in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        )
    ),
    "model.norm.weight",
    "lm_head.weight",
]
"""Names of the parameters of a Llama in its order, which safetensors do not keep."""

ROWS = (
    Row("DeepSpeed ZeRO-0", lambda m: m.deepspeed("stage0-fp32")),
    Row("DeepSpeed ZeRO-1", lambda m: m.deepspeed("zero1-dp2")),
    Row("DeepSpeed ZeRO-2, round-robin", lambda m: m.deepspeed("zero2-round-robin")),
    Row("DeepSpeed ZeRO-3, frozen and tied weights", lambda m: m.deepspeed("zero3-frozen")),
    Row("DeepSpeed ZeRO-3, sub-groups", lambda m: m.deepspeed("zero3-dp2"), nightly=True),
    Row("DeepSpeed AutoTP, uneven", lambda m: m.deepspeed("zero1-autotp"), nightly=True),
    Row("DeepSpeed pipeline, tied", lambda m: m.deepspeed("pipeline")),
    Row("DeepSpeed native MoE", lambda m: m.deepspeed("moe")),
    Row("DeepSpeed universal", lambda m: m.deepspeed_universal("zero1-dp2")),
    Row("DCP of FSDP2, 3 ranks", lambda m: m.ranks("fsdp2"), settings=NETS),
    Row(
        "DCP of FSDP2 with TP, 2 x 2 ranks",
        lambda m: m.ranks("tensor_parallel"),
        settings=NETS,
        nightly=True,
    ),
    Row("a run of core", lambda m: m.core, settings=NORMS),
    Row("one `torch.save`, tied", Makers.whole),
    Row("a `torch.save` of every rank (verl)", lambda m: m.ranks("rank_files"), settings=NETS),
    Row("accelerate `save_state`", lambda m: m.ranks("accelerated"), settings=NETS),
    Row("Hugging Face folder", Makers.huggingface, settings={"order": ORDER}),
    Row("Megatron `torch_dist`, TP 2", Makers.megatron, nightly=True),
    Row("Megatron `mp_rank`, TP 2 x PP 2", Makers.megatron_legacy),
    Row("universal", Makers.universal, settings=NORMS),
)
"""All kinds of sources, in the order of the page."""


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights with decay, vectors without."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> None:
    for _ in range(3):
        model(torch.randn(16, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _process(script: Path, *arguments: str) -> None:
    """Run a maker in a process of its own, which forks ranks."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _module(path: Path) -> ModuleType:
    """A file of tests, for the checkpoints that it makes by hand."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
