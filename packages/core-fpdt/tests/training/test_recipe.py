"""core's ``train`` recipe with ``enable = ["fpdt"]``: the losses of the plain run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from core.discovery import discover
from core.recipes.settings import TrainSettings
from core.recipes.train import evaluate, train_model
from core.testing import tiny
from core.testing.fixtures import make_run
from core_fpdt import enable

TINY = {
    "model": "small:tiny",
    "steps": 4,
    "evaluate_every": 2,
    "text_limit": 60_000,
    "vocabulary": 300,
    "sequence_length": 48,
    "batch_size": 4,
    "evaluate_sequences": 8,
    "warmup_steps": 2,
}
FPDT = {"chunk_tokens": 16, "loss_chunk_bytes": 64 * 1024}


def trained(folder: Path, enabled: bool, **changes: Any) -> list[dict[str, float]]:
    chosen: dict[str, Any] = {"enable": ["fpdt"], "fpdt": FPDT} if enabled else {}
    with make_run(folder, plugins=discover(), train=TINY | changes, **chosen) as run:
        assert set(run.plan.ids) == ({"fpdt.chunks", "fpdt.share"} if enabled else set())
        train_model(run)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"optimizer": "adamw"}], ids=str)
def test_losses_are_those_of_the_plain_run(changes: Any, tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", False, **changes)
    ours = trained(tmp_path / "ours", True, **changes)
    assert len(plain) >= 4
    assert plain[0]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-2)
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.keys() == theirs.keys()
        # Muon multiplies differences of rounding: 1e-4 where losses agree to 1e-6.
        for name, limit in {"loss": 1e-4, "held_out": 1e-4, "gradient": 1e-3}.items():
            if name in theirs:
                assert mine[name] == pytest.approx(theirs[name], rel=limit), name


def test_bfloat16(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", False, precision="bfloat16")
    ours = trained(tmp_path / "ours", True, precision="bfloat16")
    assert ours[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=1e-2)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        for value in made:
            if isinstance(value, Tensor) and not value.is_meta:
                self.bytes = max(self.bytes, value.numel() * value.itemsize)
        return result


def test_evaluation_of_a_long_sequence_stays_in_chunks(tmp_path: Path) -> None:
    length = 512
    model = tiny.llama(max_position_embeddings=length)
    text = torch.randint(
        1, tiny.VOCABULARY, (2, length), generator=torch.Generator().manual_seed(0)
    )
    with make_run(tmp_path / "run") as run:
        plain = evaluate(model, text, run, TrainSettings())
        with enable(model, chunk_tokens=64, loss_chunk_bytes=32 * 1024), Largest() as largest:
            found = evaluate(model, text, run, TrainSettings())
    assert found == pytest.approx(plain, rel=1e-6)
    # Neither logits (2 * 512 * 96) nor hidden states between projections of the feed-forward part.
    assert largest.bytes <= 2 * length * 32 * 4
