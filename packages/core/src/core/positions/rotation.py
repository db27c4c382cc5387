"""The rotation in force on a model: where its tokens stand, and the policy applied to them.

A model whose rotary embedding was replaced by :class:`~core.positions.rotary.Unrotated` hands queries and
keys over as they were projected, and keeps such keys in its cache. What is here remembers the
positions of the cached keys, batch by batch, and lets the policy rotate right before attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from core.errors import ModelError
from core.positions.rotary import Rotary
from core.positions.tokens import RequestState, Tokens

if TYPE_CHECKING:
    from core.positions.policy import Positions

_MARK = "_core_rotation"


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

    def before(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder: find the batch that this pass continues."""
        names = list(inspect.signature(owner.forward).parameters)
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

    def turn(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, position_ids: Any
    ) -> tuple[Tensor, Tensor]:
        """Rotate the queries and all keys of one layer by the policy.

        Args:
            module: the attention module.
            query: (B, H, Tq, D), not rotated.
            key: (B, Hkv, Tk, D), not rotated, with all cached ones.
            mask: the layer's mask, if it is a tensor.
            position_ids: (B, Tq) as the layer was given them, if it was.
        """
        batch = self._current
        if batch is None or batch.positions is None:
            raise ModelError(f"{type(module).__name__} was called outside of its model")
        length = query.shape[2]
        own = batch.positions[:, -length:]
        # Replays of gradient checkpointing come late: then the layer knows better where it stands.
        if isinstance(position_ids, Tensor) and position_ids.shape[-1] == length:
            own = position_ids.expand(query.shape[0], -1)
        keys = own if key.shape[2] == length else batch.last(key.shape[2])
        self._begin(batch, module, query, key, mask)
        of_queries = Tokens(self.rotary, own, batch.requests)
        of_keys = Tokens(self.rotary, keys, batch.requests, keys=True)
        return self.policy.rotate(module, query, of_queries), self.policy.rotate(
            module, key, of_keys
        )

    def _begin(
        self, batch: Batch, module: nn.Module, query: Tensor, key: Tensor, mask: Any
    ) -> None:
        if id(module) in batch.begun:
            return
        batch.begun.add(id(module))
        rows = torch.arange(query.shape[0], device=query.device)
        last = _last_real(batch.mask, query)
        visible = _visible(mask, batch.mask, last, key.shape[2])
        # Decisions carry no gradient, and a replay for a backward pass does not take them again.
        query, key = query.detach()[rows, :, last].unsqueeze(2), key.detach()
        self.policy.begin(module, query, key, visible, batch.requests)


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


def _last_real(padding: Tensor | None, query: Tensor) -> Tensor:
    """(B,) index of the last token of each prompt among the queries."""
    batch, length = query.shape[0], query.shape[2]
    steps = torch.arange(length, device=query.device)
    if padding is None:
        return steps[-1:].expand(batch)
    return torch.where(padding[:, :length].to(query.device), steps, 0).amax(dim=1)


def _visible(mask: Any, padding: Tensor | None, last: Tensor, count: int) -> Tensor:
    """(B, Tk) which keys the last token of each prompt sees."""
    steps = torch.arange(count, device=last.device)
    seen = steps <= last.unsqueeze(1)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        shown = shown.any(dim=1).expand(last.shape[0], -1, -1)
        rows = torch.arange(last.shape[0], device=last.device)
        return seen & shown[rows, last, :count]
    if padding is not None:
        padded = nn.functional.pad(padding, (0, max(0, count - padding.shape[1])))
        seen = seen & padded[:, :count].to(last.device)
    return seen
