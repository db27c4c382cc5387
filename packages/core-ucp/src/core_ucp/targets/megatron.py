"""``torch_dist`` folders that Megatron-core's ``dist_checkpointing`` loads on any layout.

Tensors keep the names that the view gives them, so a view of another framework is brought into
Megatron's form by lenses beforehand. The optimizer is written as ``fully_reshardable``, the form
that Megatron loads into any tensor, pipeline and data parallelism.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from core.errors import CheckpointError
from core_ucp.files.archives import read_archive
from core_ucp.files.new_archives import new_archive
from core_ucp.files.new_pickles import Call, Encoded, Instance, Reference, encode
from core_ucp.files.pickles import Inert, Located
from core_ucp.files.trees import number
from core_ucp.sources.megatron.common import CLASSES
from core_ucp.targets.dcp import Folder
from core_ucp.targets.target import NewFile, Target
from core_ucp.view.files import Files
from core_ucp.view.keys import EXTRA, parse_key
from core_ucp.view.view import Atom, View

_COMMON = "common.pt"
_FORM = "fully_reshardable"
_VOCABULARY = ("word_embeddings.weight", "output_layer.weight", "output_layer.bias")


@dataclass(frozen=True)
class MegatronOptions:
    """How a folder of Megatron is made.

    Attributes:
        dtype: of the model's floating-point weights; that of their half-precision copies unless
            given, or their own.
        master: what the weights in full precision are called among the optimizer's states:
            ``param`` for Megatron's distributed optimizer, ``fp32_param`` for the other one.
        vocabulary_multiple: rows of the vocabulary are filled up to a multiple of this with zeros.
            Megatron fills up what is missing by itself when it loads.
        limit: bytes up to which one file is filled.
    """

    dtype: torch.dtype | None = None
    master: str = "param"
    vocabulary_multiple: int = 1
    limit: int = 4 * 2**30


def build(view: View, options: MegatronOptions | None = None) -> Target:
    """Lay out a folder of Megatron with one iteration.

    Args:
        view: the source, in Megatron's names and shapes.
        options: dtypes and sizes.

    Raises:
        CheckpointError: for a key that two tensors would have.
    """
    chosen = options or MegatronOptions()
    iteration = view.resume.step or 0
    inside = f"iter_{iteration:07}/"
    folder = Folder(chosen.limit, inside)
    for key, path, atom in _tensors(view, chosen):
        folder.tensor(key, (path,), atom, _padded(path, atom, chosen.vocabulary_multiple))
    common = _Common(view)
    archive = new_archive(inside + _COMMON, common.tree())
    config = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    files = (
        *folder.close(),
        folder.metadata(),
        archive.file,
        _text(inside + "metadata.json", json.dumps(config)),
        _text("latest_checkpointed_iteration.txt", str(iteration)),
    )
    return Target(files, tuple(folder.wanted), remarks=(*_remarks(view), *common.remarks))


def _tensors(view: View, options: MegatronOptions) -> Iterator[tuple[str, str, Atom]]:
    """Key in the view, key in the folder, and the form of every tensor."""
    stepped = {
        part.parameter for key in view.atoms if (part := parse_key(key)) is not None and part.state
    }
    for key, atom in view.atoms.items():
        part = parse_key(key)
        if part is None:
            # Whatever is not of the optimizer would be a weight to Megatron.
            if view.framework == "megatron":
                yield key, key.removeprefix(EXTRA), atom
        elif part.state:
            if part.state != "step":
                yield key, f"optimizer.state.{part.state}.{part.parameter}", atom
        else:
            yield key, part.parameter, _as(atom, _dtype(view, key, atom, options))
            if part.parameter in stepped and atom.dtype.is_floating_point:
                path = f"optimizer.state.{options.master}.{part.parameter}"
                yield key, path, _as(atom, torch.float32)


def _dtype(view: View, key: str, atom: Atom, options: MegatronOptions) -> torch.dtype:
    """Dtype of a weight in the model."""
    if not atom.dtype.is_floating_point:
        return atom.dtype
    if options.dtype is not None:
        return options.dtype
    return view.twins[key].dtype if key in view.twins else atom.dtype


def _as(atom: Atom, dtype: torch.dtype) -> Atom:
    return Atom(atom.shape, dtype, atom.pieces, atom.relation)


def _padded(path: str, atom: Atom, multiple: int) -> tuple[int, ...]:
    """Shape with rows that fill the vocabulary up."""
    if not path.endswith(_VOCABULARY) or not atom.shape:
        return atom.shape
    rows = atom.shape[0] + -atom.shape[0] % multiple
    return (rows, *atom.shape[1:])


def _text(name: str, text: str) -> NewFile:
    content = text.encode()
    return NewFile(name, len(content), ((0, content),))


def _remarks(view: View) -> Iterator[str]:
    steps = {
        round(float(number(view.files, atom)), 6)
        for key, atom in view.atoms.items()
        if key.endswith(".step") and atom.numel == 1 and parse_key(key) is not None
    }
    if len(steps) > 1:
        raise CheckpointError(
            f"{view.path} has parameters that have taken {min(steps):g} and {max(steps):g} steps",
            why="Megatron keeps one number for all of them",
        )
    if view.aliases:
        yield f"{', '.join(sorted(view.aliases))}: tied, and left to Megatron's arguments"
    extra = [key for key in view.atoms if parse_key(key) is None]
    if extra and view.framework != "megatron":
        yield f"{len(extra):,} further tensors have no place in Megatron: {extra[0]}, ..."
    yield "random numbers are not carried over: load with --no-load-rng"


@dataclass
class _Common:
    """What stands once beside the tensors."""

    view: View
    remarks: list[str] = field(default_factory=list)

    def tree(self) -> dict[str, Any]:
        """The content of ``common.pt``: Megatron's own where the source has it."""
        source = self.view.path / _COMMON
        if self.view.framework == "megatron" and source.is_file():
            return self._carried()
        resume = self.view.resume
        tree: dict[str, Any] = {
            "checkpoint_version": 3.0,
            "iteration": resume.step or 0,
            "content_metadata": _content(),
            "args": Instance(Reference("argparse", "Namespace"), dict(resume.counters)),
        }
        if resume.scheduler:
            tree["opt_param_scheduler"] = dict(resume.scheduler)
        if resume.hyper:
            tree["optimizer"] = self._optimizer()
        self.remarks.append(
            "arguments of the model are not known: load with --no-use-checkpoint-args"
        )
        return tree

    def _optimizer(self) -> dict[str, Any]:
        step = self.view.resume.step
        known: list[tuple[dict[str, Any], list[int]]] = []
        for index, (name, found) in enumerate(self.view.resume.hyper.items()):
            hyper = {**_multipliers(name, found), **found}
            numbers = next((numbers for other, numbers in known if other == hyper), None)
            if numbers is None:
                known.append((hyper, [index]))
            else:
                numbers.append(index)
        shared = {} if step is None else {"step": step}
        groups = [{**hyper, **shared, "params": numbers} for hyper, numbers in known]
        tree: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.view.resume.scaler:
            tree["grad_scaler"] = dict(self.view.resume.scaler)
        return {**tree, "param_state_sharding_type": _FORM}

    def _carried(self) -> dict[str, Any]:
        """Megatron's own, with the form of the optimizer that is written."""
        files = Files(self.view.path)
        found: Any = read_archive(files, _COMMON, CLASSES)
        tree = {key: self._alive(files, value, str(key)) for key, value in found.items()}
        tree["content_metadata"] = {**_mapping(tree.get("content_metadata")), **_content()}
        if "optimizer" in tree:
            tree["optimizer"] = _in_form(tree["optimizer"])
        return tree

    def _alive(self, files: Files, value: Any, place: str) -> Any:
        """A value that can be pickled again; what cannot is left out with a remark."""
        match value:
            case Inert():
                return self._object(files, value, place)
            case Located():
                return _tensor(files, value)
            case Mapping():
                pairs = {k: self._alive(files, v, f"{place}.{k}") for k, v in value.items()}
                return {k: v for k, v in pairs.items() if v is not _GONE}
            case list() | tuple():
                items = [self._alive(files, v, f"{place}.{i}") for i, v in enumerate(value)]
                kept = [item for item in items if item is not _GONE]
                return kept if isinstance(value, list) else tuple(kept)
            case _:
                try:
                    encode(value)
                except CheckpointError as error:
                    self.remarks.append(f"{place} is left out of {_COMMON}: {error.what}")
                    return _GONE
                return value

    def _object(self, files: Files, value: Inert, place: str) -> Any:
        module, _, name = value.kind.rpartition(".")
        kind = Reference(module, name)
        if value.items or (value.arguments and value.state is not None):
            self.remarks.append(f"{place} is left out of {_COMMON}: it is a {value.kind}")
            return _GONE
        if isinstance(value.state, Mapping):
            return Instance(kind, self._alive(files, value.state, place))
        arguments = tuple(self._alive(files, argument, place) for argument in value.arguments)
        return Call(kind, arguments)


_GONE = Encoded(b"")


def _content() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": _FORM,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _multipliers(name: str, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron knows its groups by."""
    return {
        "wd_mult": 0.0 if hyper.get("weight_decay") == 0 else 1.0,
        "lr_mult": 1.0,
        "is_expert_parallel": ".experts." in name,
        "is_decoupled_lr": False,
    }


def _in_form(optimizer: Any) -> Any:
    """The state of an optimizer, or of several, with the form that is written."""
    if not isinstance(optimizer, Mapping):
        return optimizer
    changed = {key: _in_form(value) for key, value in optimizer.items()}
    if "param_state_sharding_type" in changed:
        changed["param_state_sharding_type"] = _FORM
    return changed


def _tensor(files: Files, value: Located) -> torch.Tensor:
    buffer = bytearray(value.storage.nbytes)
    files.read_into(value.file, value.storage.offset, memoryview(buffer))
    if not buffer:
        return torch.empty(value.shape, dtype=value.dtype)
    flat = torch.frombuffer(buffer, dtype=value.dtype)
    return torch.as_strided(flat, value.shape, value.stride, value.first).clone()
