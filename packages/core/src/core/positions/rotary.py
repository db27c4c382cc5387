"""The rotary embedding that a model brings along, as something a policy of positions can call.

Layouts differ by model (half-split, interleaved, partial), and so do the rules by which frequencies
change with the length. Nothing of this is written again here: the model's own embedding gives the
angles, and the function of the modelling file turns the vectors.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.equivalence import decoder
from core.errors import ModelError

# Longer than any request; still exact as a float32, in which angles are computed.
_ANY_LENGTH = 2**24


class Rotary:
    """The model's own rotation of queries and keys.

    Args:
        owner: the module that holds the embedding and hands its angles to the layers.
        attribute: name of the embedding in ``owner``.

    Example::

        rotary = Rotary.of(model)
        turned = rotary.rotate(attention, query, position_ids)
    """

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        self.owner = owner
        self.attribute = attribute
        self.embedding: nn.Module = getattr(owner, attribute)
        self._typed = "layer_type" in inspect.signature(self.embedding.forward).parameters

    @classmethod
    def of(cls, model: nn.Module) -> Rotary:
        """Find the rotary embedding of a model's text decoder.

        Raises:
            ModelError: for a model without one, with several, or with one of several dimensions.
        """
        name = type(model).__name__
        found = [
            (owner, attribute)
            for owner in decoder(model).modules()
            for attribute, child in owner.named_children()
            if re.search(r"Rotary\w*Embedding$", type(child).__name__)
        ]
        if len(found) != 1:
            why = f"it has {len(found)} rotary embeddings" if found else _why_none(model)
            raise ModelError(f"the positions of {name} cannot be replaced", why=why)
        rotary = cls(*found[0])
        if rotary._has_sections():
            why = "its rotary embedding has several dimensions (mrope)"
            raise ModelError(f"the positions of {name} cannot be replaced", why=why)
        return rotary

    def replace(self) -> Callable[[], None]:
        """Replace the embedding by :class:`Unrotated`; returns what puts it back."""
        setattr(self.owner, self.attribute, Unrotated(self.embedding))
        return partial(setattr, self.owner, self.attribute, self.embedding)

    def regime(self, module: nn.Module, length: int) -> int:
        """Return which frequencies hold for a request: equal numbers mean equal frequencies.

        Args:
            module: the attention module.
            length: all tokens of the request that are known, or will be.

        Returns:
            0 where the length does not matter, else the length that stands for the regime.
        """
        kind = self._of_layer("rope_type", module)
        if "dynamic" in kind:
            return length if length > int(getattr(self.embedding, "original_max_seq_len", 0)) else 0
        if kind != "longrope":
            return 0
        parameters: Any = getattr(self.embedding, "config").rope_parameters  # noqa: B009
        if self._typed:
            parameters = parameters[self._layer_type(module)]
        original = int(parameters["original_max_position_embeddings"])
        return _ANY_LENGTH if length > original else original

    def tables(
        self, module: nn.Module, x: Tensor, positions: Tensor, regime: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, with the model's own scale, from the model's own embedding.

        Args:
            module: the attention module; some models rotate by type of layer.
            x: gives dtype and device.
            positions: (B, T), possibly fractional.
            regime: what :meth:`regime` returned.

        Raises:
            ModelError: for positions beyond the regime.
        """
        if regime:
            if bool((positions > regime - 1).any()):
                why = f"a position lies beyond the length {regime} that fixes the frequencies"
                raise ModelError("positions do not fit the regime of the rotation", why=why)
            # The embedding decides by the largest position it sees: show it one.
            last = positions.new_full((positions.shape[0], 1), regime - 1)
            cos, sin = self._call(module, x, torch.cat([positions, last], dim=1))
            return cos[:, :-1], sin[:, :-1]
        return self._call(module, x, positions)

    def rotate(self, module: nn.Module, x: Tensor, positions: Tensor, regime: int = 0) -> Tensor:
        """Rotate queries or keys as the modelling file does.

        Args:
            module: the attention module.
            x: (B, H, T, D), not rotated.
            positions: (B, T), or (B, Hp, T) for positions by head; where Hp is a multiple of H,
                every head is repeated for its positions and the result has Hp heads.
            regime: what :meth:`regime` returned.
        """
        if positions.dim() == 3:
            return self._rotate_heads(module, x, positions, regime)
        width = self.width(module)
        cos, sin = self.tables(module, x, positions, regime)
        turning, rest = x[..., :width], x[..., width:]
        turned: Tensor = _apply_function(module)(turning, turning[:, :0], cos, sin)[0]
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def width(self, module: nn.Module) -> int:
        """Number of leading dimensions of a head that are rotated."""
        prefix = f"{self._layer_type(module)}_" if self._typed else ""
        frequencies: Tensor = getattr(self.embedding, f"{prefix}inv_freq")
        return 2 * frequencies.numel()

    def _rotate_heads(self, module: nn.Module, x: Tensor, positions: Tensor, regime: int) -> Tensor:
        batch, heads, length = positions.shape
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
        folded = x.reshape(batch * heads, 1, length, x.shape[3])
        turned = self.rotate(module, folded, positions.reshape(batch * heads, length), regime)
        return turned.view(batch, heads, length, x.shape[3])

    def _call(self, module: nn.Module, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        typed = (self._layer_type(module),) if self._typed else ()
        return _checked(self.embedding, self.embedding(x, positions, *typed))

    def _layer_type(self, module: nn.Module) -> str:
        own = getattr(module, "layer_type", None)
        config: Any = getattr(module, "config", None)
        return str(own if own is not None else config.layer_types[module.layer_idx])

    def _of_layer(self, name: str, module: nn.Module) -> str:
        value: Any = getattr(self.embedding, name, "default")
        return str(value[self._layer_type(module)] if isinstance(value, dict) else value)

    def _has_sections(self) -> bool:
        config = getattr(self.embedding, "config", None)
        parameters = getattr(config, "rope_parameters", None) or {}
        return hasattr(self.embedding, "mrope_section") or "mrope_section" in parameters


class Unrotated(nn.Module):
    """Stands in for a rotary embedding and leaves queries and keys as they are.

    Args:
        original: the embedding it replaces; kept as a child, so that it moves with the model.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self._widths: dict[tuple[Any, ...], int] = {}

    def forward(self, x: Tensor, position_ids: Tensor, *typed: Any, **named: Any) -> Any:
        """Return cosines of 1 and sines of 0."""
        if position_ids.dim() != 2:
            why = f"position ids have {position_ids.dim()} dimensions"
            raise ModelError("positions cannot be replaced", why=why)
        key = (*typed, *named.values())
        if key not in self._widths:
            tables = self.original(x[:, :1], position_ids[:, :1], *typed, **named)
            self._widths[key] = _checked(self.original, tables)[0].shape[-1]
        shape = (*position_ids.shape, self._widths[key])
        return x.new_ones(shape), x.new_zeros(shape)


def _checked(embedding: nn.Module, tables: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(tables, tuple) or len(tables) != 2:
        kind = type(embedding).__name__
        raise ModelError("unknown kind of rotation", why=f"{kind} does not return cos and sin")
    return tables


def _apply_function(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    # By the classes it derives from: wrappers of parallel training put a class of theirs on top.
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "apply_rotary_pos_emb", None)
        if callable(function):
            return function  # type: ignore[no-any-return]
    name = type(module).__name__
    raise ModelError(f"{name} cannot be rotated", why="its file has no apply_rotary_pos_emb")


def _why_none(model: nn.Module) -> str:
    source = sys.modules.get(type(model).__module__)
    if any("alibi" in name.lower() for name in vars(source)):
        return "it has no rotary embedding; it biases its scores by distance (ALiBi)"
    tables = [m for m in decoder(model).modules() if isinstance(m, nn.Embedding)]
    if len(tables) > 1:
        return "it has no rotary embedding; its positions are learned"
    return "it has no rotary embedding"
