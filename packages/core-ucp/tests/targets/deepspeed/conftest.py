"""Views of known tensors, and readers of DeepSpeed's files that need no DeepSpeed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from core_ucp.execution.copying import execute
from core_ucp.execution.planning import plan
from core_ucp.targets.deepspeed import DeepSpeedOptions, build
from core_ucp.targets.target import Target
from core_ucp.view.files import Files
from core_ucp.view.keys import parse_key
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, Resume, View

Tensors = dict[str, Tensor]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def make_view(
    folder: Path,
    tensors: Mapping[str, Tensor],
    twins: Mapping[str, Tensor] | None = None,
    aliases: Mapping[str, str] | None = None,
    details: Mapping[str, Any] | None = None,
    **resume: Any,
) -> View:
    """A view of tensors by key, which lie in one file; it tells the order unless details do."""
    weights = [part.parameter for part in map(parse_key, tensors) if part and not part.state]
    details = {"order": weights} | dict(details or {})
    folder.mkdir(exist_ok=True)
    content = bytearray()
    places: dict[int, int] = {}
    for tensor in [*tensors.values(), *(twins or {}).values()]:
        if id(tensor) not in places:
            places[id(tensor)] = len(content)
            content += bits(tensor) + bytes(-tensor.nbytes % 8)
    (folder / "data").write_bytes(content)

    def atom(key: str, tensor: Tensor) -> Atom:
        shape = tuple(tensor.shape)
        part = parse_key(key)
        scalar = part is not None and part.state == "step"
        pieces = Pieces.dense(shape, 0, places[id(tensor)], tensor.dtype.itemsize)
        return Atom(shape, tensor.dtype, pieces, "scalar" if scalar else "elementwise")

    return View(
        path=folder,
        framework="test",
        files=Files(folder, ["data"]),
        atoms={key: atom(key, tensor) for key, tensor in tensors.items()},
        twins={key: atom(key, tensor) for key, tensor in (twins or {}).items()},
        aliases=aliases or {},
        details=details,
        resume=Resume(**resume),
    )


class Stub:
    """Stands for a class of DeepSpeed; keeps what it was called with."""

    def __new__(cls, *arguments: Any) -> Stub:
        made = object.__new__(cls)
        made.arguments = arguments
        return made

    arguments: tuple[Any, ...]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("deepspeed"):
            return type(name, (Stub,), {"path": f"{module}.{name}"})
        return super().find_class(module, name)


def load(path: Path) -> Any:
    module = ModuleType("stubs")
    vars(module).update(Unpickler=_Unpickler, load=pickle.load)
    return torch.load(path, pickle_module=module, weights_only=False, mmap=True)


class Written:
    """A checkpoint that was made, and its tensors put together again.

    The way of ``zero_to_fp32``: ranks are joined, and parameters follow ``param_shapes``.
    """

    def __init__(self, folder: Path, options: DeepSpeedOptions, target: Target) -> None:
        self.options, self.target = options, target
        self.folder = folder / (folder / "latest").read_text()

    def model(self, rank: int = 0) -> dict[str, Any]:
        name = f"zero_pp_rank_{rank}_" if self.options.stage == 3 else ""
        return dict(load(self.folder / f"{name}mp_rank_00_model_states.pt"))

    def optimizer(self, rank: int) -> dict[str, Any]:
        prefix = "bf16_" if self.options.dtype == "bf16" else ""
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        return dict(load(self.folder / name)["optimizer_state_dict"])

    def base(self, rank: int) -> dict[str, Any]:
        key = "optimizer_state_dict" if self.options.stage == 3 else "base_optimizer_state"
        return dict(self.optimizer(rank)[key])

    def tensors(self) -> Tensors:
        shapes = self.model()["param_shapes"]
        ranks = [self.optimizer(rank) for rank in range(self.options.world_size)]
        cut = self._parts if self.options.stage == 3 else self._group
        found: Tensors = {}
        for index, named in enumerate(shapes):
            for key, parts in self._buffers(ranks, index).items():
                if parts[0].dim() == 0:
                    assert len({bits(part) for part in parts}) == 1
                    found |= {_key(name, key): parts[0] for name in named}
                else:
                    found |= {_key(n, key): t for n, t in cut(ranks, index, named, parts).items()}
        return found

    def _buffers(self, ranks: list[dict[str, Any]], index: int) -> dict[str, list[Tensor]]:
        stage3 = self.options.stage == 3
        masters = "fp32_flat_groups" if stage3 else "single_partition_of_fp32_groups"
        base = "optimizer_state_dict" if stage3 else "base_optimizer_state"
        found = {"": [rank[masters][index] for rank in ranks]}
        for state in ranks[0][base]["state"].get(index, {}):
            found[state] = [rank[base]["state"][index][state] for rank in ranks]
            if not stage3 and found[state][0].dim():
                # The states of stages 1 and 2 are stored with the padding, the weights without.
                padding = [rank["group_paddings"][index] for rank in ranks]
                for part, count in zip(found[state], padding, strict=True):
                    assert not part[len(part) - count :].any()
                found[state] = [
                    part[: len(part) - count]
                    for part, count in zip(found[state], padding, strict=True)
                ]
        return found

    def _group(
        self, ranks: list[dict[str, Any]], index: int, named: Any, parts: list[Tensor]
    ) -> Tensors:
        whole, at, found = torch.cat(parts), 0, {}
        between = ranks[0]["param_alignment_paddings"][index]
        for (name, shape), gap in zip(named.items(), between, strict=True):
            found[name] = whole[at : at + shape.numel()].view(shape)
            at += shape.numel() + gap
        assert at == len(whole)
        return found

    def _parts(
        self, ranks: list[dict[str, Any]], index: int, named: Any, parts: list[Tensor]
    ) -> Tensors:
        at, found = 0, {}
        for name, shape in named.items():
            share = -(-shape.numel() // len(ranks))
            whole = torch.cat([part[at : at + share] for part in parts])
            assert not whole[shape.numel() :].any()
            found[name] = whole[: shape.numel()].view(shape)
            at += share
        assert all(len(part) == at for part in parts)
        return found


def _key(name: str, state: str) -> str:
    return f"optim.state.{name}.{state}" if state else f"model.{name}"


def write(view: View, folder: Path, options: DeepSpeedOptions) -> Written:
    target = build(view, options)
    folder.mkdir()
    execute(plan(view, target), folder)
    return Written(folder, options, target)


@pytest.fixture
def viewed() -> Callable[..., View]:
    return make_view


@pytest.fixture
def written() -> Callable[[View, Path, DeepSpeedOptions], Written]:
    return write


@pytest.fixture
def adam() -> Callable[..., Tensors]:
    """Random weights and moments by key, for shapes by name."""

    def make(shapes: Mapping[str, tuple[int, ...]], step: float = 3.0) -> Tensors:
        made = torch.Generator().manual_seed(len(shapes))
        found: Tensors = {}
        for name, shape in shapes.items():
            found[f"model.{name}"] = torch.randn(shape, generator=made)
            for state in ("exp_avg", "exp_avg_sq"):
                found[f"optim.state.{name}.{state}"] = torch.randn(shape, generator=made)
            found[f"optim.state.{name}.step"] = torch.tensor(step)
        return found

    return make
