"""All linear layers of a model, packed one after the other so that memory does not double."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from core.engines.common import evaluating
from core.equivalence import probe_tokens
from core.errors import EngineError
from core_splitfuse.linears.packed import PackedLinear, can_be_packed

logger = logging.getLogger("core")

_OFF = "turn splitfuse.pack_linears off"


class PackedLinears:
    """Packs the plain linear layers of a live model, until :meth:`restore`.

    A weight that is used elsewhere, too, stays as it is: tied embeddings, views of flat buffers,
    memory shared between processes. So do subclasses of ``nn.Linear`` and sharded weights.

    Args:
        model: on the CPU.

    Raises:
        EngineError: for a model on another device, without a layer that can be packed, or of a dtype
            that this processor cannot multiply; the model is as it was then.

    Example::

        packed = PackedLinears(model)
        model(tokens)
        packed.restore()
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._packed: list[PackedLinear] = []
        _require_cpu(model)
        self._pack()
        if not self._packed:
            raise EngineError(
                f"{type(model).__name__} has no linear layer that can be packed",
                why="all are of another class, or their weights are used elsewhere, too",
                fix=_OFF,
            )

    def __len__(self) -> int:
        """Number of packed layers."""
        return len(self._packed)

    def refresh(self) -> None:
        """Pack anew what was given other values since."""
        touched = [packed for packed in self._packed if not packed.untouched]
        for packed in touched:
            self._packed.remove(packed)
            packed.restore()
        if touched:
            self._pack()

    def restore(self) -> None:
        """Leave the model as it was: the same parameters with the same values."""
        while self._packed:
            self._packed.pop().restore()

    @contextmanager
    def unpacked(self) -> Generator[None]:
        """The model as it was, for as long as its weights are written."""
        self.restore()
        try:
            yield
        finally:
            self._pack()

    def _pack(self) -> None:
        uses = Counter(
            id(p) for module in self.model.modules() for p in module.parameters(recurse=False)
        )
        linear = [module for module in self.model.modules() if isinstance(module, nn.Linear)]
        try:
            for layer in linear:
                if can_be_packed(layer) and uses[id(layer.weight)] == 1:
                    self._packed.append(PackedLinear(layer))
        except EngineError:
            self.restore()
            raise
        logger.info("%d of %d linear layers are packed", len(self._packed), len(linear))


def pack(model: nn.Module) -> PackedLinears:
    """Pack the linear layers of a language model, and see that it gets along with it.

    Raises:
        EngineError: as :class:`PackedLinears`, and for a model that reads their weights itself.
    """
    packed = PackedLinears(model)
    try:
        with evaluating(model):
            found: Any = model(input_ids=probe_tokens(model, 4)[:1], use_cache=False)
        finite = bool(found.logits.isfinite().all())
    except BaseException:
        packed.restore()
        raise
    if not finite:
        packed.restore()
        raise EngineError(
            f"the linear layers of {type(model).__name__} cannot be packed",
            why="it reads their weights itself: its logits are not finite",
            fix=_OFF,
        )
    return packed


def _require_cpu(model: nn.Module) -> None:
    backend: Any = torch.backends.mkldnn
    if not backend.is_available():
        raise EngineError("this PyTorch cannot pack linear layers", why="it lacks oneDNN", fix=_OFF)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.device.type != "cpu":
            why = f"one is on {module.weight.device}"
            raise EngineError("only linear layers on the CPU can be packed", why=why, fix=_OFF)
