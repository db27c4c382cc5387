"""Token-wise modules in tiles: what one tile needs in between exists for one tile at a time.

Only the input is saved. The backward pass runs every tile again and differentiates it. Parameters
are inputs of the autograd function and get their gradients from it once, so that their hooks, and
FSDP's, see one gradient instead of one for every tile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.equivalence import decoder
from core.errors import ModelError
from core_fpdt.layer.graphs import refuse_graph
from core_fpdt.layer.replaying import Conditions, random_state, replayed
from core_fpdt.layer.slicing import Sums
from core_fpdt.loss.cross_entropy import pieces as pieces_of

_FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe|experts", re.IGNORECASE)


def tile(module: nn.Module, *, pieces: int = 0, tokens: int = 0) -> Callable[[], None]:
    """Run a token-wise module in tiles of the sequence.

    Args:
        module: takes (B, T, H) as its first argument, computes every token by itself, and returns
            one tensor of as many tokens. Other arguments are handed on as they are.
        pieces: number of tiles.
        tokens: or the number of tokens in a tile; what fits into one is run as ever.

    Returns:
        What puts the module back.

    Raises:
        ValueError: unless exactly one of ``pieces`` and ``tokens`` is given.

    The module raises :class:`~core.errors.ModelError` when it is called with other tensors, or
    returns something else.

    Example::

        undo = tile(layer.mlp, pieces=4)
    """
    if (pieces > 0) == (tokens > 0):
        raise ValueError("give either the number of pieces or of tokens in a tile")
    before = vars(module).get("forward")
    vars(module)["forward"] = partial(_forward, module, before, pieces, tokens)
    return partial(_put_back, module, before)


def final_norm(model: nn.Module) -> nn.Module | None:
    """Find the normalization behind the last layer of a model: a direct child of its decoder."""
    children = decoder(model).named_children()
    norms = [child for name, child in children if _is_norm(child) and "emb" not in name]
    return norms[-1] if norms else None


def feed_forward(layer: nn.Module) -> nn.Module | None:
    """Find the feed-forward part of a decoder layer, or its mixture of experts.

    Returns:
        Of the children that are called so, and hold no attention, the one with most parameters.
    """
    found = [
        child
        for name, child in layer.named_children()
        if _FEED_FORWARD.search(f"{name} {type(child).__name__}") and not _attends(child)
    ]
    return max(found, key=_size, default=None) if any(map(_size, found)) else None


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters())


def _attends(module: nn.Module) -> bool:
    return any("Attention" in type(child).__name__ for child in module.modules())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def _put_back(module: nn.Module, before: Any) -> None:
    if before is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = before


def _forward(
    module: nn.Module,
    before: Any,
    pieces: int,
    tokens: int,
    hidden: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    extra = (*args, *kwargs.values())
    if hidden.dim() < 2 or any(isinstance(value, Tensor) for value in extra):
        why = "it is called with more than one tensor, or without a sequence in dimension 1"
        raise ModelError(f"a {type(module).__name__} cannot be run in tiles", why=why)
    whole = before or partial(type(module).forward, module)
    size = tokens or max(1, -(-hidden.shape[1] // pieces))
    if size >= hidden.shape[1]:
        return whole(hidden, *args, **kwargs)
    work = _Work(module, partial(_call, whole, args, kwargs), size)
    return _Tiles.apply(work, hidden, *work.inputs)  # type: ignore[no-untyped-call]


def _call(whole: Any, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Any:
    return whole(hidden, *args, **kwargs)


class _Work(nn.Module):
    """One call of a module; a module itself, because parameters can be replaced in modules only."""

    def __init__(self, module: nn.Module, call: Callable[[Tensor], Any], size: int) -> None:
        super().__init__()
        self.module = module
        self.call = call
        self.size = size
        wanted = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in wanted]
        self.inputs = [parameter for _, parameter in wanted]

    def forward(self, hidden: Tensor) -> Tensor:
        """Run a tile (B, t, H)."""
        # Mixtures of experts view it as (B * t, H).
        output = self.call(hidden.contiguous())
        if isinstance(output, Tensor) and output.shape[:-1] == hidden.shape[:-1]:
            return output
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        why = f"for {tuple(hidden.shape)} it returns {found}, not one tensor with as many tokens"
        raise ModelError(f"a {type(self.module).__name__} cannot be run in tiles", why=why)

    def tiles(self, length: int) -> Iterator[slice]:
        """The ranges of tokens that are run at a time."""
        return pieces_of(length, self.size)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.work = work
        ctx.conditions, ctx.random = (
            Conditions(hidden.device, work.module),
            random_state(hidden.device),
        )
        ctx.save_for_backward(hidden, *parameters)
        with ctx.conditions.again():
            first, *rest = work.tiles(hidden.shape[1])
            part = work(hidden[:, first])
            output: Tensor = part.new_empty(*hidden.shape[:-1], part.shape[-1])
            output[:, first] = part
            for rows in rest:
                output[:, rows] = work(hidden[:, rows])
        return output

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_graph("a module in tiles")
        work: _Work = ctx.work
        hidden, *parameters = ctx.saved_tensors
        # Aliases: hooks on the parameters themselves would be called for every tile.
        aliases = [parameter.detach().requires_grad_() for parameter in parameters]
        named = dict(zip(work.names, aliases, strict=True))
        total = torch.empty_like(hidden) if ctx.needs_input_grad[1] else None
        sums = Sums(parameters)
        with replayed(ctx.random, hidden.device), ctx.conditions.again(), torch.enable_grad():
            for rows in work.tiles(hidden.shape[1]):
                tokens = hidden[:, rows].detach().requires_grad_(total is not None)
                output = torch.func.functional_call(work, named, (tokens,))
                inputs = [*aliases, tokens] if total is not None else aliases
                found = torch.autograd.grad(output, inputs, grad[:, rows], allow_unused=True)
                if total is not None:
                    total[:, rows] = found[-1]
                for number in range(len(aliases)):
                    sums.add(number, found[number], lambda whole: whole)
        return None, total, *sums.take()
