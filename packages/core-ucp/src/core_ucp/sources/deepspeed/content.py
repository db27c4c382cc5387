"""The files of a checkpoint, opened: their trees, which of them are current, and whether they agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import takewhile
from typing import Any

from core.errors import CheckpointError
from core_ucp.files.archives import read_archive
from core_ucp.files.pickles import Inert
from core_ucp.sources.deepspeed.folder import Folder
from core_ucp.view.files import Files

ALLOWED = (
    "deepspeed.*",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.*",
    "numpy.*",
    "torch.torch_version.TorchVersion",
    "datetime.*",
)
"""Classes that come out inert: DeepSpeed's own, and harmless ones that users save along."""

Tree = Callable[[str], Mapping[str, Any]]
"""The tree of a file, by its name."""


@dataclass(frozen=True)
class Model:
    """A file of model states.

    Attributes:
        name: of the file.
        tree: what it holds.
    """

    name: str
    tree: Mapping[str, Any]


@dataclass(frozen=True)
class Optimizer:
    """A file of optimizer states of one rank.

    Attributes:
        name: of the file.
        tree: its ``optimizer_state_dict``.
    """

    name: str
    tree: Mapping[str, Any]


@dataclass
class Content:
    """Everything that belongs to one checkpoint.

    Attributes:
        folder: the names of the files.
        files: the table of files.
        stage: of ZeRO.
        dp: data-parallel degree.
        tp: tensor-parallel degree.
        pp: stages of the pipeline.
        models: by (data-parallel rank, model-parallel rank); only rank 0 below stage 3.
        optimizers: by (data-parallel rank, model-parallel rank); none in stage 0.
        remarks: what a user should know.
    """

    folder: Folder
    files: Files
    stage: int
    dp: int
    tp: int
    pp: int
    models: dict[tuple[int, int], Model] = field(default_factory=dict)
    optimizers: dict[tuple[int, int], Optimizer] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def mp(self) -> int:
        """Number of model-parallel ranks."""
        return self.tp * self.pp

    def read(self, name: str) -> Any:
        """The tree of a file."""
        return read(self.files, name)

    def fail(self, what: str, why: str = "", fix: str = "") -> CheckpointError:
        """An error about this checkpoint."""
        return CheckpointError(f"{self.folder.path} {what}", why=why, fix=fix)


def read(files: Files, name: str) -> Mapping[str, Any]:
    """The tree of a file.

    Raises:
        CheckpointError: when it is damaged, wants to run code, or holds no mapping.
    """
    tree = read_archive(files, name, ALLOWED)
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{files.folder / name} is damaged", why="it holds no mapping")
    return tree


def open_content(folder: Folder) -> Content:
    """Open all files of a checkpoint that are current.

    Raises:
        CheckpointError: when ranks are missing, or files of several checkpoints are mixed.
    """
    files = Files(folder.path)
    tree = cache(partial(read, files))  # the first files are looked at twice
    first = _first(folder, tree)
    stage, prefix = _stage(folder, tree, first)
    parallel = first.tree.get("checkpoint_parallel_dimensions")
    sizes = parallel if isinstance(parallel, Mapping) else {}
    mp = _degree(first, "mp_world_size")
    held = len({rank for _, rank in folder.layers}) if folder.layers else mp
    tp = int(sizes.get("tp_degree") or held)
    pp = int(sizes.get("pp_degree") or mp // tp)
    if tp < 1 or tp * pp != mp:
        raise CheckpointError(
            f"{folder.path} has {mp} model-parallel ranks",
            why=f"{tp} tensor-parallel ranks in each of {pp} stages would be {tp * pp}",
        )
    content = Content(folder, files, stage, _degree(first, "dp_world_size"), tp, pp)
    if stage == 3:
        content.models |= _taken(content, folder.zero_models, content.dp, tree)
    else:
        grid = {(0, rank): name for rank, name in folder.models.items()}
        content.models |= _taken(content, grid, 1, tree)
    if stage:
        for at, model in _taken(content, folder.optimizers[prefix], content.dp, tree).items():
            content.optimizers[at] = Optimizer(model.name, _inner(folder, model))
    _stale(content)
    _agree(content)
    return content


def _first(folder: Folder, tree: Tree) -> Model:
    """A file that says how many ranks there were."""
    names = [*folder.models.values()][:1] + [*folder.zero_models.values()][:1]
    both = [Model(name, tree(name)) for name in names]
    if len(both) == 1:
        return both[0]
    whole, part = both
    stage = config_of(part.tree).get("zero_optimization", {}).get("stage")
    newer = (folder.path / part.name).stat().st_mtime_ns > (
        folder.path / whole.name
    ).stat().st_mtime_ns
    return part if stage == 3 and newer else whole


def _stage(folder: Folder, tree: Tree, first: Model) -> tuple[int, str]:
    """Stage of ZeRO, and the prefix of the files of its optimizer."""
    config = config_of(first.tree)
    prefixes = sorted(folder.optimizers)
    if first.tree.get("optimizer") is not None or not prefixes:
        return 0, ""
    bf16 = _enabled(config, "bf16") or _enabled(config, "bfloat16")
    wanted = "bf16_" if bf16 else ""
    prefix = wanted if wanted in folder.optimizers else prefixes[0]
    grid = folder.optimizers[prefix]
    name = grid[min(grid)]
    stage = _inner(folder, Model(name, tree(name))).get("zero_stage")
    if isinstance(stage, Inert) and stage.arguments:
        stage = stage.arguments[0]
    if stage is None:
        stage = 1  # the optimizer of bf16 without ZeRO keeps its groups as stage 1 does
    if not isinstance(stage, int) or stage not in (1, 2, 3):
        raise CheckpointError(f"{folder.path / name} is of the unknown ZeRO stage {stage!r}")
    return stage, prefix


def _inner(folder: Folder, model: Model) -> Mapping[str, Any]:
    tree = model.tree.get("optimizer_state_dict")
    if not isinstance(tree, Mapping):
        raise CheckpointError(
            f"{folder.path / model.name} is damaged", why="it holds no optimizer_state_dict"
        )
    return tree


def _degree(first: Model, key: str) -> int:
    value = first.tree.get(key)
    if not isinstance(value, int) or not 1 <= value <= 1_000_000:
        raise CheckpointError(f"{first.name} does not say its {key}", why=f"it holds {value!r}")
    return value


def _enabled(config: Mapping[str, Any], key: str) -> bool:
    section = config.get(key)
    return isinstance(section, Mapping) and bool(section.get("enabled"))


def config_of(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the run that wrote a file of model states."""
    found = tree.get("ds_config")
    return found if isinstance(found, Mapping) else {}


def _taken(
    content: Content, grid: Mapping[tuple[int, int], str], dp: int, tree: Tree
) -> dict[tuple[int, int], Model]:
    """The files of all ranks that there should be, opened."""
    wanted = ((rank, mp) for mp in range(content.mp) for rank in range(dp))
    there = list(takewhile(grid.__contains__, wanted))
    count = content.mp * dp
    if len(there) < count:
        mp, rank = divmod(len(there), dp)
        present = sum(r < dp and m < content.mp for r, m in grid)
        like = next(iter(grid.values()), "")
        raise content.fail(
            f"is incomplete: {count - present} of {count} files are missing",
            why=f"there is none of data-parallel rank {rank} and model-parallel rank {mp}"
            + (f" beside {like}" if like else ""),
            fix="copy the files of all nodes into one folder",
        )
    return {at: Model(grid[at], tree(grid[at])) for at in there}


def _stale(content: Content) -> None:
    """Remark on files that an older run has left."""
    folder = content.folder
    used = {model.name for model in content.models.values()}
    used |= {optimizer.name for optimizer in content.optimizers.values()}
    names = [*folder.models.values(), *folder.zero_models.values()]
    names += [name for grid in folder.optimizers.values() for name in grid.values()]
    left = sorted(set(names) - used)
    if left:
        content.remarks.append(
            f"{len(left)} files are left from an older run with other ranks, and are not read:"
            f" {', '.join(left[:4])}{', ...' if len(left) > 4 else ''}"
        )


def _agree(content: Content) -> None:
    """Make sure that all files were written at one step of one run."""
    models = list(content.models.values())
    for key in ("global_steps", "dp_world_size", "mp_world_size", "ds_version"):
        values = [model.tree.get(key) for model in models]
        odd = next((i for i, value in enumerate(values) if value != values[0]), None)
        if odd is not None:
            raise content.fail(
                "mixes files of several checkpoints",
                why=f"{models[0].name} has {key} {values[0]!r}, and {models[odd].name} has"
                f" {values[odd]!r}",
            )
