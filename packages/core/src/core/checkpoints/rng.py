"""Random number generators of a rank, as tensors: saved with every checkpoint, restored exactly."""

from __future__ import annotations

import random
from collections.abc import Container, Mapping

import numpy as np
import torch
from torch import Tensor

NAME = "rng"
"""Name of the random state in every checkpoint; below it the rank and the generator."""


def named(rank: int) -> dict[str, Tensor]:
    """The captured state of this rank, by names in a checkpoint."""
    return {f"{NAME}.{rank}.{key}": tensor for key, tensor in capture().items()}


def room(rank: int, saved: Container[str]) -> dict[str, Tensor]:
    """Tensors for those states that the checkpoint has; it may come from a machine without GPU."""
    return {name: tensor for name, tensor in named(rank).items() if name in saved}


def bring_back(rank: int, step: int, loaded: Mapping[str, Tensor]) -> None:
    """Restore this rank's generators, or derive new ones for a rank that was not there."""
    if loaded:
        restore({name.rpartition(".")[2]: tensor for name, tensor in loaded.items()})
    else:
        derive(step, rank)


def capture() -> dict[str, Tensor]:
    """States of the generators of Python, numpy, torch and, where used, the GPU of this rank."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    found = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": _doubles(float("nan") if gauss is None else gauss),
        "numpy": torch.from_numpy(np.asarray(inner["key"]).astype(np.int64)),
        "numpy_rest": _doubles(inner["pos"], numpy_state["has_gauss"], numpy_state["gauss"]),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(state: Mapping[str, Tensor]) -> None:
    """Put the generators back into a captured state."""
    version, *words = (int(word) for word in state["python"].tolist())
    gauss = float(state["python_gauss"])
    random.setstate((version, tuple(words), None if gauss != gauss else gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _doubles(*values: float) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def derive(step: int, rank: int) -> None:
    """Seed all generators anew for a rank that the checkpoint does not know."""
    mixed = int(np.random.SeedSequence([step, rank]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
