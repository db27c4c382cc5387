"""Which of the files in a folder belong to one DeepSpeed checkpoint, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from core.disk import disk_errors
from core.errors import CheckpointError
from core_ucp.files.texts import read_note

LATEST = ("latest", "latest_universal")
"""Files in which a run notes the tag that it has saved last."""

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_ZERO_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(bf16_|fp16_|)zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT_OPTIMIZER = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_UNIVERSAL = "zero"


@dataclass(frozen=True)
class Folder:
    """The files of one tag.

    Attributes:
        path: of the tag's folder.
        models: by model-parallel rank, of runs whose ranks hold whole weights.
        zero_models: by (data-parallel rank, model-parallel rank), of stage 3.
        optimizers: by (data-parallel rank, model-parallel rank), by prefix.
        layers: by (layer, tensor-parallel rank), of pipelines.
        experts: by (layer of experts, expert, model-parallel rank).
        expert_optimizers: by (expert-parallel rank, model-parallel rank), of stage 0.
    """

    path: Path
    models: Mapping[int, str] = field(default_factory=dict)
    zero_models: Mapping[tuple[int, int], str] = field(default_factory=dict)
    optimizers: Mapping[str, Mapping[tuple[int, int], str]] = field(default_factory=dict)
    layers: Mapping[tuple[int, int], str] = field(default_factory=dict)
    experts: Mapping[tuple[int, int, int], str] = field(default_factory=dict)
    expert_optimizers: Mapping[tuple[int, int], str] = field(default_factory=dict)

    @property
    def universal(self) -> bool:
        """Whether DeepSpeed's converter made it."""
        return is_universal(self.path)

    def __bool__(self) -> bool:
        return bool(self.models or self.zero_models or self.universal)


def is_universal(path: Path) -> bool:
    """Whether a folder is what DeepSpeed's own converter makes."""
    return (path / _UNIVERSAL).is_dir() and (path / _UNIVERSAL / "optimizer_state.pt").is_file()


def scan(path: Path) -> Folder:
    """Sort the files of a tag's folder by their names; others are left alone."""
    models: dict[int, str] = {}
    zero_models: dict[tuple[int, int], str] = {}
    optimizers: dict[str, dict[tuple[int, int], str]] = {}
    layers: dict[tuple[int, int], str] = {}
    experts: dict[tuple[int, int, int], str] = {}
    expert_optimizers: dict[tuple[int, int], str] = {}
    for name in _names(path):
        if found := _MODEL.fullmatch(name):
            models[int(found[1])] = name
        elif found := _ZERO_MODEL.fullmatch(name):
            zero_models[int(found[1]), int(found[2])] = name
        elif found := _OPTIMIZER.fullmatch(name):
            optimizers.setdefault(found[1], {})[int(found[2]), int(found[3])] = name
        elif found := _LAYER.fullmatch(name):
            layers[int(found[1]), int(found[2] or 0)] = name
        elif found := _EXPERT.fullmatch(name):
            experts[int(found[1] or 0), int(found[2]), int(found[3])] = name
        elif found := _EXPERT_OPTIMIZER.fullmatch(name):
            expert_optimizers[int(found[1]), int(found[2])] = name
    return Folder(path, models, zero_models, optimizers, layers, experts, expert_optimizers)


def _names(path: Path) -> Iterable[str]:
    with disk_errors(f"cannot read {path}"):
        return sorted(entry.name for entry in path.iterdir())


def find(path: Path) -> Folder:
    """The tag that a path means: its own folder, or the folder that tags were saved into.

    Raises:
        CheckpointError: when no tag is there, the last one is missing, or several could be meant.
    """
    own = scan(path)
    if own:
        return own
    for name in LATEST:
        if (path / name).is_file():
            return _noted(path, name, read_note(path / name))
    tags = [folder.path.name for folder in _tags(path)]
    if len(tags) == 1:
        return scan(path / tags[0])
    if tags:
        raise CheckpointError(
            f"{path} holds {len(tags)} tags and no 'latest' that names one",
            why=", ".join(tags[:8]),
            fix="name the folder of one tag",
        )
    raise CheckpointError(
        f"{path} holds no DeepSpeed checkpoint",
        why="it has no files of model states, as mp_rank_00_model_states.pt",
    )


def _noted(path: Path, note: str, tag: str) -> Folder:
    target = path / tag
    if not tag or tag != Path(tag).name or not target.is_dir():
        known = ", ".join(folder.path.name for folder in _tags(path))
        raise CheckpointError(
            f"{path / note} names {tag[:80]!r}, which is no folder beside it",
            why="the run was stopped while it saved, or the folder was removed",
            fix=f"name the folder of a tag that is there: {known}" if known else "",
        )
    found = scan(target)
    if not found:
        raise CheckpointError(
            f"{target} is incomplete",
            why="it has no files of model states, as mp_rank_00_model_states.pt",
        )
    return found


def _tags(path: Path) -> list[Folder]:
    with disk_errors(f"cannot read {path}"):
        folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir()]
    return [found for found in map(scan, folders) if found]


def detect(path: Path) -> bool:
    """Whether a path is a folder that DeepSpeed has saved into, or the folder of one tag."""
    if not path.is_dir():
        return False
    try:
        if scan(path):
            return True
        if not any((path / name).is_file() for name in LATEST):
            return bool(_tags(path))
        return bool(find(path))
    except CheckpointError:
        return False
