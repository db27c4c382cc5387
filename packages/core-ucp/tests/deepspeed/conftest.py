"""DeepSpeed folders made by hand, by the shortest way to cut tensors, and read back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from core_ucp.execution.gathering import item_type, read_box
from core_ucp.view.view import View

States = Mapping[str, Mapping[str, Tensor]]
"""Tensors of a parameter by state by name of the parameter; the master is the state ``""``."""


class Writer:
    """Writes folders as DeepSpeed does.

    Args:
        path: of the folder of the tag.
        dp: data-parallel degree.
        mp: number of model-parallel ranks.
    """

    def __init__(self, path: Path, dp: int, mp: int = 1) -> None:
        self.path, self.dp, self.mp = path, dp, mp
        path.mkdir(parents=True, exist_ok=True)

    def model(self, mp: int, groups: Sequence[States], **more: Any) -> None:
        """The file of model states of ZeRO-1 and 2."""
        torch.save(self.head(groups, **more), self.path / f"mp_rank_{mp:02d}_model_states.pt")

    def head(self, groups: Sequence[States], **more: Any) -> dict[str, Any]:
        """What is in files of model states of all stages."""
        return {
            "module": {n: s[""].bfloat16() for group in groups for n, s in group.items()},
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [{n: s[""].shape for n, s in group.items()} for group in groups],
            "shared_params": {},
            "global_steps": 3,
            "skipped_steps": 0,
            "dp_world_size": self.dp,
            "mp_world_size": self.mp,
            "ds_config": {"bf16": {"enabled": True}},
            "ds_version": "0.19.8",
        } | more

    def optimizer(self, dp: int, mp: int, tree: dict[str, Any]) -> None:
        """The file of one rank of the optimizer."""
        name = f"bf16_zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": tree}, self.path / name)

    def zero12(self, groups: Sequence[States], mp: int = 0, align: int = 1) -> None:
        """All files of the optimizer of a model-parallel rank under ZeRO-1."""
        cut = [_parts(group, self.dp, align) for group in groups]
        for rank in range(self.dp):
            states = {g: _states(parts, rank) for g, (parts, _, _) in enumerate(cut)}
            masters = [
                parts[""][rank][: max(0, len(parts[""][rank]) - (rank == self.dp - 1) * tail)]
                for parts, tail, _ in cut
            ]
            tree = {
                "base_optimizer_state": {
                    "state": states,
                    "param_groups": [{"lr": 0.1 * (g + 1), "params": [g]} for g in states],
                },
                "single_partition_of_fp32_groups": masters,
                "param_alignment_paddings": [paddings for _, _, paddings in cut],
                "partition_count": [self.dp] * len(groups),
                "zero_stage": 1,
            }
            self.optimizer(rank, mp, tree)

    def zero3(self, groups: Sequence[States], mp: int = 0, **more: Any) -> None:
        """All files of a model-parallel rank under ZeRO-3."""
        for rank in range(self.dp):
            head = self.head(groups, **more)
            head["module"] = {name: torch.empty(0) for name in head["module"]}
            name = f"zero_pp_rank_{rank}_mp_rank_{mp:02d}_model_states.pt"
            torch.save(head, self.path / name)
            flats = [
                {s: torch.cat([_share(v[s], rank, self.dp) for v in g.values()]) for s in _kinds(g)}
                for g in groups
            ]
            inner = {
                "state": {
                    i: {s: v for s, v in flat.items() if s} | {"step": torch.tensor(3.0)}
                    for i, flat in enumerate(flats)
                },
                "param_groups": [{"lr": 0.1, "params": list(range(len(groups)))}],
            }
            tree = {
                "zero_stage": 3,
                "partition_count": self.dp,
                "optimizer_state_dict": inner,
                "fp32_flat_groups": [flat[""] for flat in flats],
            }
            self.optimizer(rank, mp, tree)


def _kinds(group: States) -> list[str]:
    return list(next(iter(group.values())))


def _share(value: Tensor, rank: int, ranks: int) -> Tensor:
    part = -(-value.numel() // ranks)
    padded = torch.cat([value.reshape(-1), torch.zeros(part * ranks - value.numel())])
    return padded[rank * part : (rank + 1) * part].clone()


def _parts(group: States, ranks: int, align: int) -> tuple[dict[str, list[Tensor]], int, list[int]]:
    """Parts of the flat vector by state, its padding, and the padding of every parameter."""
    numels = [values[""].numel() for values in group.values()]
    paddings = [-numel % align for numel in numels[:-1]] + [0]
    total = sum(numels) + sum(paddings)
    tail = -total % (2 * ranks)
    found: dict[str, list[Tensor]] = {}
    for state in _kinds(group):
        rows = zip(group.values(), paddings, strict=True)
        padded = [torch.cat([v[state].reshape(-1), torch.zeros(pad)]) for v, pad in rows]
        flat = torch.cat([*padded, torch.zeros(tail)])
        found[state] = [part.clone() for part in flat.chunk(ranks)]
    return found, tail, paddings


def _states(parts: Mapping[str, list[Tensor]], rank: int) -> dict[str, Tensor]:
    found = {state: values[rank] for state, values in parts.items() if state}
    return found | {"step": torch.tensor(3.0)}


@pytest.fixture(scope="session")
def writer() -> type[Writer]:
    """Writes folders as DeepSpeed does."""
    return Writer


@pytest.fixture(scope="session")
def values() -> Callable[..., dict[str, Tensor]]:
    """A master of some shape with its states, all different."""

    def make(*shape: int, seed: int = 0, states: Sequence[str] = ("exp_avg",)) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(math.prod(shape) + 1000 * seed)
        return {s: torch.randn(shape, generator=generator) for s in ("", *states)}

    return make


@pytest.fixture(scope="session")
def read() -> Callable[[View, str], Tensor]:
    """Reads an atom of a view."""

    def read_atom(view: View, key: str) -> Tensor:
        atom = view.atoms[key]
        items = np.empty(atom.shape, item_type(atom.dtype.itemsize))
        read_box(view.files, atom, [0] * len(atom.shape), items)
        if not items.size:
            return torch.empty(atom.shape, dtype=atom.dtype)
        return torch.from_numpy(items.reshape(-1).view(np.uint8)).view(atom.dtype).view(atom.shape)

    return read_atom
