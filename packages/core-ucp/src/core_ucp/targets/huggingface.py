"""Folders that ``from_pretrained`` of transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.disk import disk_errors
from core.errors import CheckpointError
from core_ucp.files.safetensors import SHARD_SIZE, Tensor, lay_out
from core_ucp.targets.target import NewFile, Target, Wanted
from core_ucp.view.keys import MODEL
from core_ucp.view.pieces import Pieces
from core_ucp.view.view import Atom, View

CONFIG = "config.json"
_CARRIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
_LARGEST_CARRIED = 256 * 2**20


@dataclass(frozen=True)
class HuggingFaceOptions:
    """How a folder of Hugging Face is made.

    Attributes:
        dtype: of floating-point weights; as they are stored unless given.
        config: folder with ``config.json`` and the tokenizer; the source's own unless given.
        limit: bytes of tensors in one file.
    """

    dtype: torch.dtype | None = None
    config: Path | None = None
    limit: int = SHARD_SIZE


def build(view: View, options: HuggingFaceOptions | None = None) -> Target:
    """Lay out a folder with bare parameter names.

    Tied weights are written once: the configuration says which others they stand for.

    Args:
        view: the source.
        options: dtype, and where the configuration is.

    Raises:
        CheckpointError: for a source without weights, or a weight the format cannot hold.
    """
    chosen = options or HuggingFaceOptions()
    weights = {key: atom for key, atom in view.atoms.items() if key.startswith(MODEL)}
    if not weights:
        raise CheckpointError(f"{view.path} has no weights")
    dtypes = {key: _dtype(atom, chosen.dtype) for key, atom in weights.items()}
    tensors = [Tensor(k.removeprefix(MODEL), dtypes[k], a.shape) for k, a in weights.items()]
    layout = lay_out(tensors, limit=chosen.limit)
    wanted = []
    for key, tensor in zip(weights, tensors, strict=True):
        file, offset = layout.places[tensor.name]
        pieces = Pieces.dense(tensor.shape, file, offset, tensor.dtype.itemsize)
        wanted.append(Wanted(key, Atom(tensor.shape, tensor.dtype, pieces)))
    floats = {dtype for dtype in dtypes.values() if dtype.is_floating_point}
    carried = list(_carried(_folders(view, chosen.config), floats))
    remarks = [*_left_out(view), *_unconfigured(carried)]
    return Target((*layout.files, *carried), tuple(wanted), remarks=tuple(remarks))


def _dtype(atom: Atom, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and atom.dtype.is_floating_point else atom.dtype


def _folders(view: View, config: Path | None) -> list[Path]:
    """Where the configuration may be."""
    if config is not None:
        if not (config / CONFIG).is_file():
            raise CheckpointError(f"{config} has no {CONFIG}")
        return [config]
    folder = view.path if view.path.is_dir() else view.path.parent
    return [folder, folder / "huggingface"]


def _carried(folders: list[Path], floats: set[torch.dtype]) -> Iterator[NewFile]:
    """The configuration and the tokenizer, from the first folder that has a configuration."""
    folder = next((f for f in folders if (f / CONFIG).is_file()), None)
    if folder is None:
        return
    for name in (CONFIG, *_CARRIED):
        path = folder / name
        if not path.is_file():
            continue
        with disk_errors(f"cannot read {path}"):
            if path.stat().st_size > _LARGEST_CARRIED:
                raise CheckpointError(f"{path} is too large to be carried along")
            content = path.read_bytes()
        if name == CONFIG and len(floats) == 1:
            content = _with_dtype(path, content, next(iter(floats)))
        yield NewFile(name, len(content), ((0, content),))


def _with_dtype(path: Path, content: bytes, dtype: torch.dtype) -> bytes:
    """The configuration with the dtype of the weights: loading would round them to another."""
    try:
        config: Any = json.loads(content)
        keys = [key for key in ("dtype", "torch_dtype") if key in config]
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged", why=str(error)) from None
    name = str(dtype).removeprefix("torch.")
    if not isinstance(config, Mapping) or all(config[key] == name for key in keys):
        return content
    changed = {**config, **dict.fromkeys(keys, name)}
    return json.dumps(changed, indent=2).encode()


def _left_out(view: View) -> Iterator[str]:
    others = len(view.atoms) - sum(key.startswith(MODEL) for key in view.atoms)
    if others:
        yield f"{others} tensors of optimizers and others are left out: the format holds weights"
    if view.aliases:
        names = ", ".join(sorted(view.aliases))
        yield f"{names}: tied, and left to the configuration"


def _unconfigured(carried: list[NewFile]) -> Iterator[str]:
    if not carried:
        yield f"there is no {CONFIG}: from_pretrained needs one beside the weights"
