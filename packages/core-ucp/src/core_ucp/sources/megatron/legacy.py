"""The files that Megatron wrote before ``torch_dist``: one for each model-parallel rank.

``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`` holds what one coordinate of tensor, pipeline and
expert parallelism has of the model. Layers are numbered within their pipeline stage, experts within
their rank. Weights are put together by rules, and so are the states of an optimizer that is not
Megatron's distributed one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from core.errors import CheckpointError
from core_ucp.files.archives import read_archive
from core_ucp.files.pickles import Located
from core_ucp.files.trees import dotted, walk
from core_ucp.layout.gather import Local, gather
from core_ucp.layout.mesh import Coordinate, Mesh
from core_ucp.sources.megatron.common import CLASSES, Common
from core_ucp.sources.megatron.rules import AXIS, gpt_rules
from core_ucp.sources.megatron.weights import Weights
from core_ucp.sources.order import names_by_index
from core_ucp.view.files import Files
from core_ucp.view.view import Atom, View

if TYPE_CHECKING:
    from core_ucp.layout.rules import Rules

FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(?P<tp>\d{2})(?:_(?P<pp>\d{3}))?(?:_(?P<ep>\d{3}))?")
_LAYER = re.compile(r"(?P<head>(?:.*\.)?layers\.)(?P<number>\d+)(?P<tail>\..+)")
_EXPERT = re.compile(r"(?P<head>.*\.local_experts\.)(?P<number>\d+)(?P<tail>\..+)")
_MASTER = "fp32_param"


class _At(NamedTuple):
    """Coordinate of a file."""

    pp: int
    ep: int
    tp: int


@dataclass(frozen=True, eq=False)
class _Rank:
    """One file: tensors of the model and of the optimizer by their global names."""

    common: Common
    weights: Mapping[str, Located]
    states: Mapping[tuple[str, str], Located]


def open_view(path: Path, rules: Rules | None = None) -> View:
    """Open the folder of one iteration.

    Args:
        path: folder with ``mp_rank_*`` folders.
        rules: layouts of the parameters; those of Megatron's GPT models unless given.

    Raises:
        CheckpointError: for a missing rank, an optimizer that cannot be put together, and parts
            that do not fit together, naming them.
    """
    names = _names(path)
    files = Files(path)
    trees = {at: read_archive(files, name, CLASSES) for at, name in names.items()}
    layers = _first_layers(path, trees)
    experts = _experts(trees)
    ranks = {at: _rank(path, at, tree, layers[at.pp], experts) for at, tree in trees.items()}
    common = ranks[min(ranks)].common
    chosen = rules or gpt_rules(bool(common.args.get("swiglu", False)))
    found = Weights(files, common)
    aliases = _collect(ranks, chosen, found)
    return found.view(path, {"backend": "mp_rank", "files": len(files)}, aliases)


def _names(path: Path) -> dict[_At, str]:
    """Files by coordinate.

    Raises:
        CheckpointError: when one is missing, naming it.
    """
    found: dict[_At, str] = {}
    for folder in sorted(path.glob("mp_rank_*")):
        match = _FOLDER.fullmatch(folder.name)
        if match:
            at = _At(int(match["pp"] or 0), int(match["ep"] or 0), int(match["tp"]))
            found[at] = f"{folder.name}/{FILE}"
            if not (folder / FILE).is_file():
                raise CheckpointError(f"{folder / FILE} is missing")
    if not found:
        raise CheckpointError(f"{path} holds no {FILE}")
    sizes = [max(at[axis] for at in found) + 1 for axis in range(3)]
    for pp in range(sizes[0]):
        for ep in range(sizes[1]):
            for tp in range(sizes[2]):
                if _At(pp, ep, tp) not in found:
                    raise CheckpointError(f"{path} lacks the rank tp={tp} pp={pp} ep={ep}")
    return found


def _model(path: Path, tree: Any) -> Mapping[str, Any]:
    if isinstance(tree, Mapping) and isinstance(tree.get("model"), Mapping):
        found: Mapping[str, Any] = tree["model"]
        return found
    virtual = isinstance(tree, Mapping) and "model0" in tree
    raise CheckpointError(
        f"{path} holds no model",
        why="it is of interleaved pipeline stages" if virtual else "",
        fix="save it without virtual pipeline stages, or as torch_dist" if virtual else "",
    )


def _located(path: Path, tree: Any) -> Iterator[tuple[str, Located]]:
    """Tensors of the model in a file, by the names that they have there."""
    for place, leaf in walk(_model(path, tree)):
        if isinstance(leaf, Located):
            yield dotted(place), leaf


def _first_layers(path: Path, trees: Mapping[_At, Any]) -> list[int]:
    """Number of the first layer of every pipeline stage."""
    firsts, layers = [], 0
    for pp in range(max(at.pp for at in trees) + 1):
        firsts.append(layers)
        names = [name for name, _ in _located(path, trees[_At(pp, 0, 0)])]
        numbers = [int(match["number"]) for name in names if (match := _LAYER.fullmatch(name))]
        layers += max(numbers, default=-1) + 1
    return firsts


def _experts(trees: Mapping[_At, Any]) -> int:
    """Experts of one rank, where there are several ranks of them."""
    numbers = [
        int(match["number"])
        for place, _ in walk(trees[min(trees)].get("model", {}))
        if (match := _EXPERT.fullmatch(dotted(place)))
    ]
    return max(numbers, default=-1) + 1


def _rank(path: Path, at: _At, tree: Any, first_layer: int, experts: int) -> _Rank:
    weights = {
        _moved(_EXPERT, _moved(_LAYER, name, first_layer), at.ep * experts): tensor
        for name, tensor in _located(path, tree)
    }
    states = dict(_states(path, tree.get("optimizer"), weights))
    return _Rank(Common.of({k: v for k, v in tree.items() if k != "model"}), weights, states)


def _moved(pattern: re.Pattern[str], name: str, by: int) -> str:
    """A name with another number, where it has one."""
    match = pattern.fullmatch(name)
    return f"{match['head']}{int(match['number']) + by}{match['tail']}" if match else name


def _states(
    path: Path, optimizer: Any, weights: Mapping[str, Located]
) -> Iterator[tuple[tuple[str, str], Located]]:
    """States of the optimizer by parameter, in a file that numbers its parameters."""
    if not isinstance(optimizer, Mapping):
        return
    inner = optimizer.get("optimizer", optimizer)
    states = inner.get("state", {}) if isinstance(inner, Mapping) else {}
    groups = inner.get("param_groups", []) if isinstance(inner, Mapping) else []
    if not states and groups:
        raise CheckpointError(
            f"{path} holds Megatron's distributed optimizer",
            why="its states are buffers of many parameters in files of their own",
            fix="load it with Megatron and save it with --ckpt-format torch_dist",
        )
    tensors = {
        int(number): {k: v for k, v in found.items() if isinstance(v, Located) and v.shape}
        for number, found in states.items()
        if isinstance(found, Mapping)
    }
    shapes = {n: next(iter(found.values())).shape for n, found in tensors.items() if found}
    known = {name: weight.shape for name, weight in weights.items()}
    names = names_by_index(groups, shapes, known)
    for number, found in tensors.items():
        for state, tensor in found.items():
            yield (names[number], state), tensor
    masters = optimizer.get("fp32_from_fp16_params", optimizer.get("fp32_from_fp16", []))
    for group, row in zip(groups, masters, strict=False):
        for number, tensor in zip(group["params"], row, strict=True):
            yield (names[int(number)], _MASTER), tensor


def _collect(ranks: Mapping[_At, _Rank], rules: Rules, found: Weights) -> dict[str, str]:
    """Put the parts of all ranks together, and return the tied parameters."""
    parts: dict[tuple[str, str], dict[_At, Located]] = {}
    for at, rank in ranks.items():
        for name, tensor in rank.weights.items():
            parts.setdefault((name, ""), {})[at] = tensor
        for key, tensor in rank.states.items():
            parts.setdefault(key, {})[at] = tensor
    first = ranks[min(ranks)].common
    untied = bool(first.args.get("untie_embeddings_and_output_weights", False))
    names = {name for name, _ in parts}
    aliases = {} if untied else dict(_tied(names))
    for (name, state), held in parts.items():
        if name in aliases:
            continue
        atom = _atom(name, state, held, rules)
        if state:
            found.state(name, state, atom)
        else:
            found.weight(name, atom)
    return aliases


def _tied(names: set[str]) -> Iterator[tuple[str, str]]:
    """The copy of the embedding that the last pipeline stage keeps, and its owner."""
    owner = next((name for name in sorted(names) if name.endswith("word_embeddings.weight")), None)
    for name in names:
        copy = name.endswith("output_layer.weight") or "word_embeddings_for_head" in name
        if owner is not None and copy and name != owner:
            yield name, owner


def _atom(name: str, state: str, held: Mapping[_At, Located], rules: Rules) -> Atom:
    """A tensor from the parts that coordinates hold; equal ones become replicas."""
    what = f"{state} of {name}" if state else name
    dtypes = {tensor.dtype for tensor in held.values()}
    if len(dtypes) > 1 or any(not tensor.contiguous for tensor in held.values()):
        raise CheckpointError(f"the parts of {what} differ in kind")
    dtype: torch.dtype = next(iter(dtypes))
    places = sorted({(at.pp, at.ep) for at in held})
    sizes = {"copy": len(places), AXIS: max(at.tp for at in held) + 1}
    local: dict[Coordinate, Local] = {
        (places.index((at.pp, at.ep)), at.tp): Local(tensor.file, tensor.offset, tensor.shape)
        for at, tensor in held.items()
    }
    layout = rules.find(name).layout
    return gather(what, layout, Mesh(sizes), local, dtype, lossy=rules.lossy)
