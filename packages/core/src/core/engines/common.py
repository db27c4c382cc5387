"""What every engine needs: checked requests, a module that evaluates, weights replaced at once."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.engines import Request
from core.errors import EngineError


def check_request(config: Any, request: Request, known_extras: Collection[str] = ()) -> None:
    """Refuse a request that a model cannot answer.

    Args:
        config: the model's own configuration.
        request: what was asked.
        known_extras: names of ``request.extras`` that the engine understands.

    Raises:
        EngineError: for a prompt that is empty, too long, or holds unknown token ids, and for
            unknown extras.

    Example::

        def add(self, request):
            check_request(self.model.config, request, known_extras=("priority",))
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    prompt, new = request.prompt, request.sampling.max_new_tokens
    if len(prompt) == 0:
        raise EngineError("the prompt is empty", fix="give at least one token")
    mentioned = (*request.sampling.stop_ids, *request.sampling.logit_bias)
    wrong = [i for ids in (prompt, mentioned) for i in ids if not 0 <= i < text.vocab_size]
    if wrong:
        raise EngineError(f"token {wrong[0]} is not in 0..{text.vocab_size - 1}")
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and len(prompt) + new > longest:
        what = f"{len(prompt)} prompt tokens and {new} new ones do not fit"
        raise EngineError(what, why=f"the model holds {longest}")
    unknown = [name for name in request.extras if name not in known_extras]
    if unknown:
        raise EngineError(f"this engine does not know {', '.join(unknown)}")


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Without dropout and gradients; modules that were training go on doing so afterwards.

    Example::

        with evaluating(model):
            model(tokens)
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def replace_weights(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace parameters and buffers by name: all of them, or none.

    Args:
        model: the live module; its tensors stay the same objects.
        tensors: new values by the names of ``state_dict()``; of a sharded weight a DTensor on the
            same mesh.

    Raises:
        EngineError: for an unknown name, another shape, a tensor without values, or a whole tensor
            where the model's is sharded and the other way round; nothing is changed then.

    Example::

        replace_weights(model, trained.named_parameters())
    """
    # Tied weights have several names; a checkpoint may use any of them.
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own |= dict(model.named_buffers(remove_duplicate=False))
    given = dict(tensors)
    for name, tensor in given.items():
        if name not in own:
            raise EngineError(f"the model has no weight {name!r}")
        why = _misfit(own[name], tensor)
        if why:
            raise EngineError(f"the weight {name!r} cannot be replaced", why=why)
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def _misfit(own: Tensor, given: Tensor) -> str:
    if own.shape != given.shape:
        return f"the new one has the shape {tuple(given.shape)}, not {tuple(own.shape)}"
    if own.is_meta or given.is_meta:
        return f"the {'model' if own.is_meta else 'new one'} has no values yet"
    if isinstance(own, DTensor) != isinstance(given, DTensor):
        sharded, whole = ("the model's", "the new one")
        if isinstance(given, DTensor):
            sharded, whole = "the new one", "the model's"
        return f"{sharded} is a DTensor and {whole} is not"
    if isinstance(own, DTensor) and isinstance(given, DTensor):
        return "" if own.device_mesh == given.device_mesh else "they are on different meshes"
    return ""
