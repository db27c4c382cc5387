"""Pipelines: one file of weights per layer, whose names count from the layer on."""

from __future__ import annotations

from collections.abc import Collection

from core_ucp.files.pickles import Located
from core_ucp.sources.deepspeed.content import Content
from core_ucp.sources.deepspeed.shares import Share
from core_ucp.view.keys import MODEL

_TIED = "tied_modules."


def read_layers(content: Content, tp: int, trained: Collection[str]) -> Share:
    """Weights in the files of layers, under the names that they have in the whole model.

    A layer that is tied to another is ``tied_modules.<key>`` in the model; its file does not say
    its key, so it is the tied module of the same names and shapes that no layer before it was.

    Args:
        content: of the checkpoint.
        tp: tensor-parallel rank.
        trained: names of all parameters of the optimizer, as far as they are known.

    Raises:
        CheckpointError: when the file of a layer is missing.
    """
    share = Share()
    layers = sorted(at for at in content.folder.layers if at[1] == tp)
    _require_all(content, [layer for layer, _ in layers], trained)
    tied: dict[str, set[str]] = {}
    for name in trained:
        if name.startswith(_TIED):
            key, _, rest = name.removeprefix(_TIED).partition(".")
            tied.setdefault(key, set()).add(rest)
    for at in layers:
        tree = content.read(content.folder.layers[at])
        tensors = {str(k): v for k, v in tree.items() if isinstance(v, Located)}
        prefix = f"{at[0]}."
        if tensors and not any(prefix + name in trained for name in tensors):
            owner = next((key for key, rest in tied.items() if rest <= set(tensors)), None)
            if owner is not None:
                del tied[owner]
                prefix = f"{_TIED}{owner}."
        share.halves |= {prefix + name: tensor.atom() for name, tensor in tensors.items()}
    return share


def _require_all(content: Content, layers: list[int], trained: Collection[str]) -> None:
    firsts = {name.partition(".")[0] for name in trained}
    last = max([*layers, *(int(first) for first in firsts if first.isdecimal())], default=-1)
    missing = next((layer for layer in range(last + 1) if layer not in layers), None)
    if missing is not None:
        raise content.fail("is incomplete", why=f"the file of layer {missing} is missing")


def stages(share: Share, counts: list[int]) -> list[dict[str, tuple[int, ...]]]:
    """Deal the layers out to stages that train so many parameters each, in their order."""
    names = iter(share.halves.items())
    return [
        {name: atom.shape for _, (name, atom) in zip(range(count), names, strict=False)}
        for count in counts
    ]


def parameter_names(share: Share) -> set[str]:
    """Names of the parameters that have master weights."""
    return {key.removeprefix(MODEL) for key in share.atoms if key.startswith(MODEL)}
