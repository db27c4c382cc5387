"""How large the inputs of every weight are: what the error of a column costs.

A wrong weight in column ``k`` of a layer changes its output by the error times input ``k``. So the
mean squared input of each column, the diagonal of ``X^T X``, says how much squared errors count
(GPTQ, arXiv 2210.17323, and AWQ, arXiv 2306.00978, start from the same statistics). A few thousand
tokens of ordinary text are enough.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.errors import DataError, ModelError
from core_fp6.models.experts import names_of
from core_fp6.models.selecting import select
from core_fp6.progress import steps_bar


@dataclass(frozen=True)
class Calibration:
    """Mean squared inputs of the weights of a model.

    Args:
        means: parameter name to float32 ``[columns]``, or ``[experts, columns]``; on the CPU.
        tokens: that were seen.
        unseen: parameters without any input, and for experts which of them had none. Errors of
            their columns all count the same.
    """

    means: dict[str, Tensor]
    tokens: int
    unseen: dict[str, list[int]]

    def weights(self, name: str) -> Tensor | None:
        """What squared errors count in each column of a parameter; None where nothing is known."""
        return self.means.get(name)


def calibrate(
    model: nn.Module, ids: Tensor, *, skip: Sequence[str] = (), batch_size: int = 1
) -> Calibration:
    """Run text through a model and measure the inputs of the weights that would be quantized.

    Args:
        model: a model of transformers, not quantized; it is left as it was.
        ids: int64 ``[sequences, length]``, as :func:`tokenize` makes them.
        skip: modules that will not be quantized, as for ``quantize``.
        batch_size: sequences at a time.

    Raises:
        ModelError: when an input is NaN or infinite.
    """
    selection = select(model, skip)
    sums: dict[str, _Sum] = {}
    batches = torch.split(ids, batch_size)
    with (
        evaluating(model) as device,
        _watching(selection.chosen, sums),
        steps_bar("calibrate", len(batches)) as done,
    ):
        for batch in batches:
            model(input_ids=batch.to(device), use_cache=False)
            done("")
    means = {name: found.mean(name) for name, found in sums.items()}
    without = [name for name, _, _ in selection.weights() if name not in means]
    parts = {name: found.unseen() for name, found in sums.items()}
    unseen = {name: experts for name, experts in parts.items() if experts}
    return Calibration(means, ids.numel(), unseen | {name: [] for name in without})


def tokenize(tokenizer: Any, texts: Sequence[str], length: int = 512, limit: int = 0) -> Tensor:
    """Sequences of tokens of a length: documents one after another, each closed by its end token.

    Args:
        tokenizer: of the model, as transformers loads it.
        texts: the documents.
        length: tokens of a sequence.
        limit: keep this many sequences, evenly spread; 0 keeps all.

    Returns:
        int64 ``[sequences, length]``.

    Raises:
        DataError: when the texts do not fill one sequence.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    flat = torch.tensor([token for tokens in encoded for token in (*tokens, *end)])
    count = len(flat) // length
    if not count:
        raise DataError(
            f"the text has {len(flat)} tokens",
            why=f"one sequence has {length}",
            fix="give more text, or shorter sequences",
        )
    sequences = flat[: count * length].view(count, length)
    if not limit or count <= limit:
        return sequences
    return sequences[torch.linspace(0, count - 1, limit).long()]


@contextmanager
def evaluating(model: nn.Module) -> Generator[torch.device]:
    """A model without dropout and gradients for a while; yields the device of its inputs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module in training:
            module.training = True


class _Sum:
    """Sum of squared inputs, ``[matrices, columns]`` in float64, and how many there were."""

    def __init__(self, weight: Tensor) -> None:
        shape = (*weight.shape[:-2], weight.shape[-1])
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.count = torch.zeros((*weight.shape[:-2], 1), dtype=torch.int64)

    def add(self, x: Tensor, expert: int | None = None) -> None:
        squares = x.reshape(-1, x.shape[-1]).float().square()
        place = ... if expert is None else expert
        self.total[place] += squares.sum(0, dtype=torch.float64).cpu()
        self.count[place] += len(squares)

    def mean(self, name: str) -> Tensor:
        if not torch.isfinite(self.total).all():
            raise ModelError(
                f"{name} cannot be calibrated",
                why="some of its inputs are NaN or infinite",
                fix="run the model in bfloat16 or float32, or leave the module out with skip",
            )
        return torch.where(self.count > 0, self.total / self.count.clamp(min=1), 1.0).float()

    def unseen(self) -> list[int]:
        return cast("list[int]", (self.count[..., 0] == 0).nonzero().flatten().tolist())


@contextmanager
def _watching(chosen: Mapping[str, nn.Module], sums: dict[str, _Sum]) -> Generator[None]:
    with ExitStack() as hooks:
        for name, module in chosen.items():
            see = _see_linear if isinstance(module, nn.Linear) else _see_experts
            handle = module.register_forward_pre_hook(partial(see, name, sums), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _see_linear(
    name: str, sums: dict[str, _Sum], module: nn.Module, args: tuple[Any, ...], kwargs: Any
) -> None:
    (x,) = args or kwargs.values()
    weight = cast(nn.Linear, module).weight
    sums.setdefault(f"{name}.weight", _Sum(weight)).add(x)


def _see_experts(
    name: str, sums: dict[str, _Sum], module: nn.Module, args: tuple[Any, ...], kwargs: Any
) -> None:
    """The inputs of the second product lie inside of the module: the first one is done again."""
    said = cast(Any, module)
    bound = inspect.signature(said.forward).bind(*args, **kwargs).arguments
    x, index = bound["hidden_states"], bound["top_k_index"]
    outer, inner = names_of(module)
    gate = said._apply_gate if said.has_gate else said.act_fn
    for part in (outer, inner):
        sums.setdefault(f"{name}.{part}", _Sum(getattr(module, part)))
    for expert, weight in enumerate(getattr(module, outer)):
        tokens = x[(index == expert).any(-1)]
        if len(tokens):
            sums[f"{name}.{outer}"].add(tokens, expert)
            sums[f"{name}.{inner}"].add(gate(functional.linear(tokens, weight)), expert)
