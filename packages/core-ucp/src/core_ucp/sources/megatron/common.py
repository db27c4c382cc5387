"""What Megatron keeps once beside the tensors: arguments, iteration, scheduler, groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import CheckpointError
from core_ucp.files.archives import read_archive
from core_ucp.files.pickles import Inert, Located
from core_ucp.files.trees import atoms_of, number
from core_ucp.sources.full import INERT
from core_ucp.view.files import Files
from core_ucp.view.view import Atom, Resume

CLASSES = (*INERT, "functools.partial", "megatron.*", "signal.*", "torch.nn.functional.*")
"""Classes of the arguments. None of them is imported or called."""
_MESH = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "cp": "context_parallel_size",
}
_COUNTERS = (
    "consumed_train_samples",
    "consumed_valid_samples",
    "skipped_train_samples",
    "num_floating_point_operations_so_far",
)
_NO_HYPER = ("params", "param_names")


@dataclass(frozen=True)
class Common:
    """The content of ``common.pt``, or what ``model_optim_rng.pt`` has of it.

    Attributes:
        tree: everything by name, with atoms in the place of tensors.
        args: arguments of the run by name.
    """

    tree: Mapping[str, Any] = field(default_factory=dict)
    args: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: Any) -> Common:
        """Take what an archive holds."""
        if not isinstance(tree, Mapping):
            raise CheckpointError("the common state of a Megatron checkpoint is no dictionary")
        found = tree.get("args")
        args: Any = found.state if isinstance(found, Inert) else found
        return cls(atoms_of(dict(tree)), args if isinstance(args, Mapping) else {})

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of the parallel dimensions."""
        sizes = {axis: self.args.get(name) for axis, name in _MESH.items()}
        return {axis: size for axis, size in sizes.items() if isinstance(size, int)}

    @property
    def groups(self) -> list[Mapping[str, Any]]:
        """Parameter groups of all optimizers."""
        return list(_groups(self.tree.get("optimizer")))

    @property
    def vocabulary(self) -> tuple[int, int] | None:
        """Rows of the vocabulary without and with padding, where both are known."""
        size, padded = self.args.get("vocab_size"), self.args.get("padded_vocab_size")
        if isinstance(size, int) and isinstance(padded, int) and 0 < size <= padded:
            return size, padded
        return None

    def step(self, files: Files) -> float | None:
        """Steps of the optimizer, which all parameters share."""
        known = [group["step"] for group in self.groups if group.get("step") is not None]
        found = known[0] if known else _find(self.tree.get("optimizer"), "common_step")
        return None if found is None else float(_plain(files, found))

    def resume(self, files: Files, names: Mapping[str, int]) -> tuple[Resume, list[str]]:
        """What a run needs beside tensors, and what a user should know.

        Args:
            files: that atoms refer to.
            names: of the parameters that the optimizer steps, and their dimensions in a layer.
        """
        iteration = self.tree.get("iteration")
        counters = {name: self.args.get(name, self.tree.get(name)) for name in _COUNTERS}
        hyper, remarks = self._hyper(files, names)
        scaler = _find(self.tree.get("optimizer"), "grad_scaler")
        resume = Resume(
            step=iteration if isinstance(iteration, int) else None,
            hyper=hyper,
            scheduler=_plain_values(files, self.tree.get("opt_param_scheduler")),
            scaler=_plain_values(files, scaler),
            counters={k: v for k, v in counters.items() if isinstance(v, int | float)},
        )
        return resume, remarks

    def _hyper(
        self, files: Files, names: Mapping[str, int]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Settings of the groups by parameter, which Megatron deals out by a rule of its own."""
        found: dict[str, dict[str, Any]] = {}
        unclear: list[str] = []
        for name, dims in names.items():
            fitting = [_settings(files, group) for group in _fitting(self.groups, name, dims)]
            if fitting and all(settings == fitting[0] for settings in fitting):
                found[name] = fitting[0]
            else:
                unclear.append(name)
        remarks = []
        if found:
            remarks.append(
                "groups of the optimizer have no names: they were told by Megatron's own rule, that"
                " biases and vectors have no weight decay"
            )
        if unclear and self.groups:
            remarks.append(f"no hyper-parameters are known of {', '.join(sorted(unclear)[:5])}")
        return found, remarks


def read_common(files: Files, name: str) -> Common:
    """Read ``common.pt``.

    Raises:
        CheckpointError: when it is damaged or wants to run code.
    """
    return Common.of(read_archive(files, name, CLASSES))


def _groups(tree: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        if key == "param_groups" and isinstance(value, list):
            yield from (group for group in value if isinstance(group, Mapping))
        else:
            yield from _groups(value)


def _find(tree: Any, name: str) -> Any:
    """The first value of that name in a nested dictionary."""
    if not isinstance(tree, Mapping):
        return None
    if name in tree:
        return tree[name]
    return next(
        (found for value in tree.values() if (found := _find(value, name)) is not None), None
    )


def _fitting(groups: list[Mapping[str, Any]], name: str, dims: int) -> Iterator[Mapping[str, Any]]:
    """The groups that a parameter can be in."""
    flat = dims == 1 or name.endswith(".bias")
    expert = ".experts." in name
    for group in groups:
        undecayed = group.get("wd_mult", 1.0) == 0.0
        experts = bool(group.get("is_expert_parallel", False))
        if undecayed == flat and experts == expert:
            yield group


def _settings(files: Files, group: Mapping[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in group.items() if k not in _NO_HYPER}
    return _plain_values(files, plain)


def _plain_values(files: Files, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        return {}
    return {
        str(key): _plain(files, value)
        for key, value in values.items()
        if not isinstance(value, Inert | Located | type)
    }


def _plain(files: Files, value: Any) -> Any:
    return number(files, value) if isinstance(value, Atom) and value.numel == 1 else value
