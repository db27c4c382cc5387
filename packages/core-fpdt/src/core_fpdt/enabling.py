"""Switching a model to chunks, and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from core.attention import switch_attention
from core.equivalence import decoder, decoder_layers
from core.errors import ModelError
from core.owners import take
from core_fpdt.kernels.choosing import choose
from core_fpdt.layer.attention import NAME, register
from core_fpdt.layer.runner import Runner
from core_fpdt.layer.sequence import DOCUMENTS, sequence_in_force
from core_fpdt.layer.tracing import untraced
from core_fpdt.loss.head import replace_head
from core_fpdt.loss.tiles import feed_forward, final_norm, tile
from core_fpdt.parallel.mesh import Peers, peers_of
from core_fpdt.parallel.sharding import shard
from core_fpdt.probing import Probing
from core_fpdt.settings import CHUNK_TOKENS, FPDTSettings
from core_fpdt.store.making import make_budget, make_store

OWNER = "core-fpdt"


class Enabled:
    """A model whose layers, output head and final norm run in chunks. Made by :func:`enable`.

    Attributes:
        model: the model.
        settings: the settings, with everything filled in.
        runner: what runs the layers; its store is where chunks wait.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: FPDTSettings,
        peers: Peers | None,
        runner: Runner,
        undo: Callable[[], None],
    ) -> None:
        self.model = model
        self.settings = settings
        self.runner = runner
        self._peers = peers
        self._undo = undo

    def shard(self, batch: Mapping[str, Tensor]) -> MutableMapping[str, Tensor]:
        """Cut a batch of whole sequences for this rank; see :func:`core_fpdt.parallel.sharding.shard`.

        Without other ranks the batch is returned as it is.
        """
        if self._peers is None:
            return dict(batch)
        return shard(batch, self.settings.chunk_tokens, self._peers)

    def disable(self) -> None:
        """Put everything back as it was; calling it again does nothing."""
        self._undo()

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.disable()


def enable(
    model: nn.Module,
    settings: FPDTSettings | None = None,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    **changes: Any,
) -> Enabled:
    """Let a model train on long sequences: its layers run chunk by chunk, exactly as before.

    Loss and gradients are those of the model, also with padding, packed documents and windows. Call it
    when the weights are loaded and adapters are in, before the model is wrapped or sharded.

    Args:
        model: a transformers decoder, such as one with a language modeling head, maybe inside of peft.
        settings: the settings.
        group: the ranks that share each sequence, or a mesh with such a dimension (``mesh_dim``) of all
            ranks that average gradients; batches go through :meth:`Enabled.shard` then.
        changes: settings to replace, such as ``chunk_tokens=4096``.

    Raises:
        ModelError: for a model whose layers cannot be run in chunks, or compute something else then,
            by layer and reason. The model is left as it was.

    Example::

        enabled = enable(model, chunk_tokens=4096)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        enabled.disable()
    """
    layers = _chunkable(model)
    device = next(model.parameters()).device
    wanted = resolved(replace(settings or FPDTSettings(), **changes), device)
    peers = None if group is None else peers_of(group, wanted.mesh_dim)
    kernels = choose(wanted.kernel, device, next(model.parameters()).dtype)
    with ExitStack() as undo:
        slots = ("attention", "mlp", "loss")
        undo.callback(take(model, slots, OWNER))
        probing = Probing(model) if wanted.strict else None
        register()
        store = make_store(device, wanted)
        undo.callback(store.close)
        runner = Runner(
            wanted,
            store,
            make_budget(device, wanted),
            kernels,
            None if peers is None else peers.group,
        )
        undo.callback(switch_attention(model, NAME))
        for layer in layers:
            undo.callback(runner.attach(layer))
            if wanted.mlp_chunks > 1:
                undo.callback(tile(_feed_forward(layer), pieces=wanted.mlp_chunks))
        if (norm := final_norm(model)) is not None:
            undo.callback(tile(norm, tokens=wanted.chunk_tokens))
        undo.callback(replace_head(model, wanted))
        if probing is not None:
            probing.require_same(runner)
        undo.callback(_sequences(model, runner))
        return Enabled(model, wanted, peers, runner, undo.pop_all().close)


def resolved(settings: FPDTSettings, device: torch.device) -> FPDTSettings:
    """Settings with what depends on the device filled in."""
    if settings.chunk_tokens:
        return settings
    return replace(settings, chunk_tokens=CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cuda"]))


def _chunkable(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, if they can be run in chunks at all.

    Raises:
        ModelError: when they cannot.
    """
    what = f"{type(model).__name__} cannot be run in chunks"
    inner: Any = decoder(model)
    if any(getattr(model, name, None) for name in ("_orig_mod", "_compiled_call_impl")):
        raise ModelError(what, why="it is compiled", fix="enable the model before compiling it")
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(what, why=f"{type(inner).__name__} is no model of transformers")
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ModelError(what, why="it is sharded", fix="enable it before sharding it")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(what, why="it has no weights yet", fix="load the weights first")
    if getattr(inner.config, "output_router_logits", False):
        why = "router logits of chunks have no gradient (output_router_logits)"
        raise ModelError(what, why=why, fix="set config.output_router_logits = False")
    layers = list(decoder_layers(model))
    for layer in layers:
        kind = type(layer).__name__
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ModelError(what, why=f"{kind} is no GradientCheckpointingLayer of transformers")
        if isinstance(getattr(layer, "_gradient_checkpointing_func", None), Runner):
            raise ModelError(what, why="it runs in chunks already", fix="disable() it first")
        if layer.gradient_checkpointing:
            fix = "switch it off: chunks save more"
            raise ModelError(what, why="gradient checkpointing is on", fix=fix)
    return layers


def _feed_forward(layer: nn.Module) -> nn.Module:
    found = feed_forward(layer)
    if found is None:
        why = f"no feed-forward part was found in {type(layer).__name__}"
        raise ModelError("fpdt.mlp_chunks cannot be heeded", why=why, fix="set it to 1")
    return found


class _Entered(threading.local):
    """What was put in force by calls of a model that have not returned, in each thread."""

    def __init__(self) -> None:
        self.stacks: list[ExitStack] = []


def _sequences(model: nn.Module, runner: Runner) -> Callable[[], None]:
    """Take the ids of documents out of batches, and put them in force for the model's masks."""
    entered = _Entered()

    @untraced
    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("output_router_logits"):
            why = "router logits of chunks have no gradient (output_router_logits)"
            raise ModelError("router logits are asked for", why=why, fix="do not ask for them")
        documents = kwargs.pop(DOCUMENTS, None)
        if runner.group is not None and documents is None and module.training:
            why = f"it has no {DOCUMENTS}"
            fix = "pass it through shard() of what enable() returned"
            raise ModelError("this batch is not cut for the ranks", why=why, fix=fix)
        if documents is not None and runner.joins_documents and bool((documents > 0).any()):
            why = "its masks do not heed position ids, so that on one rank these see each other"
            fix = "give one document in a row"
            name = type(module).__name__
            raise ModelError(f"{name} cannot share packed documents", why=why, fix=fix)
        stack = ExitStack()
        stack.enter_context(sequence_in_force(documents))
        entered.stacks.append(stack)
        return args, kwargs

    @untraced
    def after(*_: Any) -> None:
        if entered.stacks:
            entered.stacks.pop().close()

    first = model.register_forward_pre_hook(before, with_kwargs=True)
    last = model.register_forward_hook(after, always_call=True)

    def undo() -> None:
        first.remove()
        last.remove()

    return undo
