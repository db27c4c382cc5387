"""Commands as a user calls them, and small checkpoints of a trained model to call them with."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)

from core.cli import main


@dataclass(frozen=True)
class Said:
    """What a command has said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of standard output, which has to be one JSON value."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one clear error on standard error, of a command that says nothing else."""
        assert self.code == 2, self
        assert not self.out, self
        assert self.err.startswith("error: "), self
        assert "Traceback" not in self.err, self
        return self.err


def call(*words: object) -> Said:
    """Call ``core``; an exception that no user should see goes through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return Said(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Saved:
    """One trained state in several formats.

    Attributes:
        full: a file of ``torch.save``.
        dcp: a folder of DCP.
        universal: a universal folder.
        truth: tensors by DCP's keys.
    """

    full: Path
    dcp: Path
    universal: Path
    truth: dict[str, torch.Tensor]


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.1)
    model(torch.randn(3, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Checkpoints that nobody changes."""
    folder = tmp_path_factory.mktemp("saved")
    model, optimizer = trained()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1}
    torch.save({**state, "note": "as it was"}, folder / "full.pt")
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights: dict[str, Any] = dict(get_model_state_dict(model))
    states: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=options))
    dcp.save({"model": weights, "optim": states}, checkpoint_id=folder / "dcp", no_dist=True)
    said = call("convert", folder / "full.pt", folder / "universal", "--to", "universal")
    assert said.code == 0, said
    truth = {f"model.{name}": tensor for name, tensor in weights.items()}
    truth |= {f"optim.{k}": t for k, t in states.items() if isinstance(t, torch.Tensor)}
    return Saved(folder / "full.pt", folder / "dcp", folder / "universal", truth)


@pytest.fixture
def core() -> Callable[..., Said]:
    """Calls the command line as a user does: exit status, standard output, standard error."""
    return call
