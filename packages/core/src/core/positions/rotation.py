"""The rotation in force on a model: where its tokens stand, and the policy applied to them.

A model whose rotary embedding was replaced by :class:`~core.positions.rotary.Unrotated` hands queries and
keys over as they were projected, and keeps such keys in its cache. What is here remembers the
positions of the cached keys, batch by batch, and lets the policy rotate right before attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.positions.policy import ModelPositions, Positions
from core.positions.rotary import Rotary
from core.positions.tokens import RequestState, Tokens
from core.positions.visible import last_real, visible

_MARK = "_core_rotation"

BATCH_ARGUMENT = "core_batch"
"""Keyword argument that tells an attention function which batch its tokens belong to."""


class Batch:
    """The rows of one padded batch: positions of all their tokens so far, and their requests."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.requests: list[RequestState] = []
        self.mask: Tensor | None = None
        self.begun: set[int] = set()

    def truncate(self, past: int) -> None:
        """Forget all but the first ``past`` tokens: a cache may have been cropped."""
        if self.positions is not None:
            self.positions = self.positions[:, :past]

    def extend(self, positions: Tensor, rows: int) -> None:
        """Add the positions of the tokens of this forward pass."""
        positions = positions.expand(rows, -1)
        if self.positions is None:
            self.positions, self.requests = positions, [RequestState() for _ in range(rows)]
        elif self.positions.shape[0] != rows:
            raise ModelError("the rows of a batch changed while its cache was in use")
        else:
            self.positions = torch.cat([self.positions, positions], dim=1)
        longest = (self.positions.amax(dim=1) + 1).tolist()
        for request, length in zip(self.requests, longest, strict=True):
            request.length = int(length)

    def last(self, count: int) -> Tensor:
        """Positions behind the ``count`` keys of a cache layer.

        A layer with a window keeps the last tokens only; one of fixed size is empty at its end.
        """
        assert self.positions is not None
        missing = count - self.positions.shape[1]
        if missing > 0:
            return nn.functional.pad(self.positions, (0, missing))
        return self.positions[:, -missing:]


class Rotation:
    """A policy of positions in force on one model.

    Args:
        policy: the policy.
        rotary: the model's own rotation.
    """

    def __init__(self, policy: Positions, rotary: Rotary) -> None:
        self.policy = policy
        self.rotary = rotary
        self._current: Batch | None = None
        self._batches: WeakKeyDictionary[Any, Batch] = WeakKeyDictionary()
        self._placed = False

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Hook into a model whose rotary embedding was replaced.

        Returns:
            What takes the hooks off again.
        """
        owner, replaced = self.rotary.owner, getattr(self.rotary.owner, self.rotary.attribute)
        stack = ExitStack()
        for hook in (
            owner.register_forward_pre_hook(self.before, with_kwargs=True),
            replaced.register_forward_pre_hook(self.place, with_kwargs=True),
            owner.register_forward_hook(self.after),
        ):
            stack.callback(hook.remove)
        mark(model, self)
        stack.callback(mark, model, None)
        return stack.close

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model starts without anybody's caches.
        return {"policy": self.policy, "rotary": self.rotary}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def before(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the decoder: find the batch that this pass continues."""
        parameters = inspect.signature(owner.forward).parameters
        names = list(parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if past:
            if cache not in self._batches:
                why = "its keys were cached while another rotation was in force"
                raise ModelError("this cache cannot be continued", why=why, fix="start it anew")
            self._current = self._batches[cache]
        else:
            self._current = Batch()
            if cache is not None:
                self._batches[cache] = self._current
        self._current.truncate(past)
        is_padding = isinstance(mask, Tensor) and mask.dim() == 2
        self._current.mask = mask.bool() if is_padding else None  # type: ignore[union-attr]
        self._placed = False
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return args, kwargs
        # On its way through the layers, as a replay for a backward pass comes after other batches.
        return args, {**kwargs, BATCH_ARGUMENT: self._current}

    def place(self, unrotated: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the replaced embedding: learn the positions of the new tokens."""
        names = ("x", "position_ids")
        given = dict(zip(names, args, strict=False)) | kwargs
        # Called once for every type of layer, with the same positions.
        if not self._placed and self._current is not None:
            hidden = given["x"] if "x" in given else given["hidden_states"]
            self._current.extend(given["position_ids"], hidden.shape[0])
            self._placed = True

    def after(self, owner: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the decoder: a cache may have been made inside."""
        values = output.values() if isinstance(output, Mapping) else output
        for value in values if not isinstance(values, Tensor) else ():
            if hasattr(value, "get_seq_length") and self._current is not None:
                self._batches.setdefault(value, self._current)

    def batch(self, module: nn.Module, kwargs: Mapping[str, Any]) -> Batch:
        """Return the batch that a call of an attention function belongs to.

        In the replays of gradient checkpointing that is not the last one that was begun.

        Args:
            module: the attention module.
            kwargs: keyword arguments of the call, as they came.

        Raises:
            ModelError: outside of the model.
        """
        # A few families do not pass arguments on: theirs is the last batch.
        batch: Batch | None = kwargs.get(BATCH_ARGUMENT) or self._current
        if batch is None or batch.positions is None:
            raise ModelError(f"{type(module).__name__} was called outside of its model")
        return batch

    def turn(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Rotate the queries and all keys of one layer by the policy.

        Args:
            module: the attention module.
            query: (B, H, Tq, D), not rotated.
            key: (B, Hkv, Tk, D), not rotated, with all cached ones.
            mask: the layer's mask; a policy reads a tensor or a
                :class:`~core.positions.visible.ReadableMask`.
            kwargs: keyword arguments of the attention function, as they came.

        Raises:
            ModelError: for a prompt in pieces under a policy that must see it whole, and for a
                mask that the policy cannot read.

        Example::

            query, key = in_force(module).turn(module, query, key, mask, kwargs)
        """
        batch = self.batch(module, kwargs)
        assert batch.positions is not None
        position_ids, length = kwargs.get("position_ids"), query.shape[2]
        own = batch.positions[:, -length:]
        # A layer run in chunks, or again after its cache grew, knows better where it stands.
        if isinstance(position_ids, Tensor) and position_ids.shape[-1] == length:
            own = position_ids.expand(query.shape[0], -1)
        keys = own if key.shape[2] == length else batch.last(key.shape[2])
        self._begin(batch, module, query, key, mask, kwargs)
        of_queries = Tokens(self.rotary, own, batch.requests)
        of_keys = Tokens(self.rotary, keys, batch.requests, keys=True)
        return self.policy.rotate(module, query, of_queries), self.policy.rotate(
            module, key, of_keys
        )

    def _begin(
        self,
        batch: Batch,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Any,
        kwargs: Mapping[str, Any],
    ) -> None:
        if id(module) in batch.begun:
            return
        self._require_whole(batch, module, query.shape[2])
        batch.begun.add(id(module))
        if getattr(type(self.policy), "begin", None) is ModelPositions.begin:
            return  # It decides nothing, so it may meet any mask.
        rows = torch.arange(query.shape[0], device=query.device)
        last = last_real(batch.mask, query)
        seen = visible(module, mask, batch.mask, last, key.shape[2], kwargs)
        # Decisions carry no gradient, and a replay for a backward pass does not take them again.
        query, key = query.detach()[rows, :, last].unsqueeze(2), key.detach()
        self.policy.begin(module, query, key, seen, batch.requests)

    def _require_whole(self, batch: Batch, module: nn.Module, length: int) -> None:
        assert batch.positions is not None
        whole = batch.positions.shape[1]
        if self.policy.atomic_prefill and length != whole:
            raise ModelError(
                f"the policy of positions {self.policy.name!r} cannot begin",
                why=f"it must see a prompt in one piece, and {type(module).__name__} was given "
                f"{length} of {whole} tokens",
                fix="turn off what runs the layer in chunks",
            )


def mark(model: nn.Module, rotation: Rotation | None) -> None:
    """Put a rotation in force on all modules of a decoder, or lift it."""
    for module in model.modules():
        if rotation is not None:
            # On the modules, not in a table of ours: copies of the model keep it.
            setattr(module, _MARK, rotation)
        elif _MARK in vars(module):
            delattr(module, _MARK)


def in_force(module: nn.Module) -> Rotation | None:
    """Return the rotation in force on a module of a model, if there is one.

    Example::

        rotation = in_force(attention_module)
    """
    found: Rotation | None = vars(module).get(_MARK)
    return found
