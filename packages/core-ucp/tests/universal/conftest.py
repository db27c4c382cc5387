"""A universal folder with everything that such a folder can hold."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from core.storage import new_folder
from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.files.safetensors import read_tensors
from core_ucp.targets.universal import UniversalOptions, build
from core_ucp.view.view import Resume, View

RESUME = Resume(
    step=7,
    optimizer="AdamW",
    hyper={"a.weight": {"lr": 1e-3, "betas": (0.9, 0.95)}, "b": {"lr": float("inf")}},
    scheduler={"last_epoch": 7, "lrs": [1e-3, None]},
    counters={"consumed_samples": 56},
    client={"note": "ünïcode / and slashes", "nested": {"1": [True]}},
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return {
        "model.a.weight": torch.randn(64, 33, generator=generator),
        "model.b": torch.randn(5, generator=generator).to(torch.bfloat16),
        "model.fp8": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "model.flags": torch.tensor([True, False, True]),
        "model.special": special,
        "model.empty": torch.empty(0, 4),
        "optim.state.a.weight.exp_avg": torch.randn(64, 33, generator=generator),
        "optim.state.a.weight.step": torch.tensor(7.0),
        "optim.state.b.exp_avg": torch.randn(5, generator=generator),
        "extra.rng": torch.arange(40, dtype=torch.uint8),
    }


def view_of(folder: Path, content: dict[str, torch.Tensor]) -> View:
    folder.mkdir(parents=True)
    save_file(content, folder / "x.safetensors")
    found = read_tensors(folder, ["x.safetensors"])
    return View(
        folder,
        "by hand",
        found.files,
        found.atoms,
        aliases={"head.weight": "a.weight"},
        resume=RESUME,
        mesh={"dp": 4},
        details={"zero stage": 2},
        remarks=["one remark"],
    )


def make(source: View, target: Path, shard_size: int = 2**30) -> Path:
    with new_folder(target) as folder:
        execute(plan(source, build(source, UniversalOptions(shard_size))), folder)
    return target


@pytest.fixture
def universal() -> SimpleNamespace:
    return SimpleNamespace(tensors=tensors, view_of=view_of, make=make, resume=RESUME)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    return make(view_of(folder / "in", tensors()), folder / "universal", 8_460)
