"""Weights as the model computes with them: whole tensors of a state dict, buffers, aliases."""

from __future__ import annotations

from collections.abc import Mapping

from core_ucp.files.pickles import Located
from core_ucp.sources.deepspeed.content import Content, Model
from core_ucp.sources.deepspeed.shares import Share


def read_module(content: Content, mp: int, share: Share) -> None:
    """Add the weights, buffers and aliases in the state dict of a model-parallel rank."""
    model = content.models[0, mp]
    module = module_of(model)
    buffers = {str(name) for name in model.tree.get("buffer_names") or ()}
    if content.stage == 3:
        # The other entries are empty: parameters live in the files of the optimizer.
        module = {name: tensor for name, tensor in module.items() if name in buffers}
    shared = model.tree.get("shared_params") or {}
    share.aliases |= {str(name): str(owner) for name, owner in shared.items()}
    share.aliases |= same_memory(module)
    for name, tensor in module.items():
        if name not in share.aliases:
            share.halves[name] = tensor.atom()


def module_of(model: Model) -> dict[str, Located]:
    """Tensors of the state dict in a file of model states."""
    module = model.tree.get("module")
    if not isinstance(module, Mapping):
        return {}
    return {str(name): value for name, value in module.items() if isinstance(value, Located)}


def same_memory(tensors: Mapping[str, Located]) -> dict[str, str]:
    """Names of tensors that are an earlier one under another name, and the earlier name."""
    first: dict[Located, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(tensor, name) if tensor.numel else name
        if owner != name:
            found[name] = owner
    return found
