"""What transformers calls instead of a checkpointing function: it runs the layer in chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import Cache

from core.errors import CoreError, ModelError
from core.positions.rotation import BATCH_ARGUMENT
from core_fpdt.kernels.choosing import Chooser
from core_fpdt.layer.attention import as_lazy
from core_fpdt.layer.call import Keeping, LayerCall
from core_fpdt.layer.function import run_in_chunks
from core_fpdt.layer.needing import Needed
from core_fpdt.layer.sequence import documents_in_force
from core_fpdt.layer.slicing import Arguments
from core_fpdt.layer.tracing import untraced
from core_fpdt.masks.lazy import LazyMask, edges
from core_fpdt.parallel.placement import Placement
from core_fpdt.parallel.shared import Shared
from core_fpdt.parallel.sharing import Alone, Sharing
from core_fpdt.settings import FPDTSettings
from core_fpdt.store.budget import Budget
from core_fpdt.store.contract import Store

logger = logging.getLogger("core")

_FILLED = 0.95
"""Share of the memory for chunks that they can fill: it is cut into slabs of equal chunks."""


class Runner:
    """Runs layers in chunks, as the settings say.

    Args:
        settings: the settings, with everything filled in.
        store: where chunks wait.
        budget: what chunks may take; ``None`` where they stay on the device.
        kernels: what computes blocks of attention.
        group: the ranks that share each sequence.

    Attributes:
        joins_documents: the model's own masks let packed documents see each other.
    """

    def __init__(
        self,
        settings: FPDTSettings,
        store: Store,
        budget: Budget | None,
        kernels: Chooser,
        group: ProcessGroup | None,
    ) -> None:
        self.settings = settings
        self.chunk = settings.chunk_tokens
        self.store = store
        self.group = group
        self._kernels = kernels
        self._keeping = Keeping(settings.keep_output, settings.keep_keys, settings.order)
        self._evaluated: WeakSet[nn.Module] = WeakSet()
        self.budget = budget
        self.joins_documents = False
        self._layers = self._longest = self._length = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        # A copied model has chunks of its own, and shares what keeps them.
        return self

    @untraced
    def __call__(self, run: partial[Any], *args: Any) -> Any:
        """Run a layer.

        Args:
            run: the layer's forward, with the layer and its keyword arguments.
            args: hidden states (B, s, H) and other positional arguments.

        Raises:
            ModelError: for a layer that cannot be run in chunks.
        """
        layer: nn.Module = run.args[0]
        forward = partial(run.func, *run.args)
        if layer in self._evaluated:
            # At once: nothing is called after an interrupt.
            self._after(layer)
        hidden, args, kwargs = self._checked(layer, args, run.keywords)
        arguments = Arguments(args, kwargs, hidden.shape[1])
        mask = arguments.find(LazyMask) or as_lazy(None, layer, hidden[:, None], hidden[:, None])
        sharing = self._sharing(hidden.shape[1], mask)
        wanted = [hidden, *arguments.differentiable, *layer.parameters()]
        graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in wanted)
        call = LayerCall(
            layer,
            forward,
            hidden,
            arguments,
            mask,
            sharing,
            self.store,
            self._kernels,
            self._keeping if graph else None,
            self._fit if sharing.edges[-1] > self._longest else None,
            BATCH_ARGUMENT in kwargs,
        )
        self._length = sharing.edges[-1]
        return run_in_chunks(call, hidden)

    def _fit(self, needed: Needed) -> Keeping:
        """Keep less of a sequence that is longer than any before, or refuse it, before more is kept.

        Of the rows of attention those at the end are kept, which cost most to compute.

        Raises:
            CoreError: with what is needed, what there is, and the longest sequence that fits.
        """
        self._longest = self._length
        if self.budget is None:
            return self._keeping
        room = int(_FILLED * self.budget.available)
        own = needed.affordable(self._length, self._layers, room)
        share = self._smallest(own)
        if share < 0:
            self.budget.require(replace(needed, share=0.0).of_all(self._layers), self._length)
            raise CoreError("another rank has no room for its chunks", fix="see what it says")
        if share < self._keeping.output:
            logger.warning(
                "fpdt: %s has room for the attention outputs of the last %.0f %% of %d tokens; "
                "the others are computed twice",
                self.budget.where,
                100 * share,
                self._length,
            )
            self._keeping = replace(self._keeping, output=share)
        return self._keeping

    def _smallest(self, share: float) -> float:
        """The smallest share of the ranks of this sequence: they go on, or stop, together."""
        if self.group is None or documents_in_force() is None:
            return share
        device = torch.device("cpu" if "cpu:" in dist.get_backend_config(self.group) else "cuda")
        found = torch.tensor(share, dtype=torch.float64, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.group)
        return float(found)

    def attach(self, layer: nn.Module) -> Callable[[], None]:
        """Let a layer be run here, in training and in evaluation.

        Returns:
            What takes it off again.
        """
        old = {name: layer.__dict__.get(name) for name in _SWITCHES}
        self._layers += 1
        layer.__dict__.update(gradient_checkpointing=True, _gradient_checkpointing_func=self)
        before = layer.register_forward_pre_hook(self._before, with_kwargs=True)
        after = layer.register_forward_hook(self._after, always_call=True)

        def undo() -> None:
            before.remove()
            after.remove()
            self._layers -= 1
            for name, value in old.items():
                layer.__dict__.pop(name, None)
                if value is not None:
                    layer.__dict__[name] = value

        return undo

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: transformers checkpoints in training only; make it call us anyway."""
        if layer.__dict__.get("_gradient_checkpointing_func") is not self:
            why = "gradient checkpointing was switched on over chunks"
            fix = "leave it off: chunks save more"
            raise ModelError(f"{type(layer).__name__} was changed", why=why, fix=fix)
        vars(layer)["gradient_checkpointing"] = True
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        if layer.training and caches and not torch.is_grad_enabled():
            # Generation, which reads its cache again; transformers would take it away.
            vars(layer)["gradient_checkpointing"] = False
        elif layer.training and any(cache.get_seq_length() for cache in caches):
            why = "chunks cannot go on after a cache in training"
            raise ModelError(f"{type(layer).__name__} cannot be run in chunks", why=why)
        elif not layer.training and not caches:
            self._evaluated.add(layer)
            layer.training = True

    def _after(self, layer: nn.Module, *_: Any) -> None:
        if layer in self._evaluated:
            self._evaluated.discard(layer)
            layer.training = False

    def _sharing(self, length: int, mask: LazyMask) -> Sharing:
        documents = documents_in_force()
        if documents is None or self.group is None:
            return Alone(edges(length, self.chunk, mask))
        placement = Placement.regular(documents.shape[1], self.chunk, self.group.size())
        if list(placement.edges) != list(edges(placement.length, self.chunk, mask)):
            why = "some tokens see behind the end of their chunk"
            raise ModelError("the sequence cannot be shared by ranks", why=why)
        return Shared(placement, self.group)

    def _checked(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        what = f"{type(layer).__name__} cannot be run in chunks"
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3:
            raise ModelError(what, why="its first argument is not (batch, tokens, width)")
        if kwargs.get("output_router_logits"):
            why = "router logits of chunks have no gradient (output_router_logits)"
            raise ModelError(what, why=why, fix="set output_router_logits=False")
        tokens = args[0].shape[1]
        rest = tuple(_readable(value, tokens) for value in args[1:])
        return args[0], rest, {name: _readable(value, tokens) for name, value in kwargs.items()}


def _readable(value: Any, tokens: int) -> Any:
    """An argument as chunks can use it: no cache, which nobody reads, and masks that are lazy."""
    if isinstance(value, Cache):
        return None
    mask = isinstance(value, Tensor) and value.dim() == 4 and value.shape[2:] == (tokens, tokens)
    return LazyMask.of(value) if mask else value


_SWITCHES = ("gradient_checkpointing", "_gradient_checkpointing_func")
