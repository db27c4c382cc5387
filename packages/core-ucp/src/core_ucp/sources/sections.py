"""Keys of others in the form of ours: which part of a saved state is the model, and which is not.

Programs name the parts of a state as they like: ``model.``, ``app.model.``, nothing at all. An
optimizer is recognised by its ``param_groups`` or by the names of its state tensors, and the model
by the parameters that the optimizer names.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import CheckpointError
from core_ucp.files.trees import Leaves, Path, dotted, nest, number
from core_ucp.sources.optimizers import Optimizer, find_optimizers
from core_ucp.sources.order import names_by_index
from core_ucp.sources.relations import distinct, relation
from core_ucp.view.files import Files
from core_ucp.view.keys import bare, extra_key, state_key, weight_key
from core_ucp.view.view import Atom, Resume

_MODELS = ("model", "module", "state_dict", "model_state_dict", "net", "network", "weights")
_SCHEDULERS = ("scheduler", "lr_scheduler", "lr_schedulers", "sched")
_SCALERS = ("scaler", "grad_scaler", "loss_scaler")
_STEPS = ("step", "global_step", "global_steps", "train_step", "iteration")


@dataclass
class Arranged:
    """A saved state in the terms of :class:`core_ucp.view.view.View`."""

    atoms: dict[str, Atom] = field(default_factory=dict)
    resume: Resume = field(default_factory=Resume)
    remarks: list[str] = field(default_factory=list)


def arrange(
    files: Files,
    leaves: Leaves,
    *,
    named: bool = False,
    weights: bool = False,
    ordered: bool = True,
    step: int | None = None,
) -> Arranged:
    """Sort the leaves of a saved state into weights, optimizer states, and the rest.

    Args:
        files: that the atoms refer to.
        leaves: atoms and plain values by path.
        named: whether the first word of every key is the name of a part, as in core's own
            checkpoints.
        weights: whether all tensors are weights where there is no optimizer.
        ordered: whether weights come in the order of the model. Where they do not, the states of an
            optimizer that numbers its parameters cannot be named, and are kept as extra tensors.
        step: optimizer steps done, where they are known.

    Raises:
        CheckpointError: when parts cannot be told apart, naming the keys.
    """
    paths = {dotted(path): path for path in leaves}
    if len(paths) != len(leaves):
        raise CheckpointError(
            "two entries have the same name", why="their dots cannot be told apart"
        )
    flat = {key: leaves[path] for key, path in paths.items()}
    optimizers, rest = find_optimizers(files, flat)
    tensors = {key: leaf for key, leaf in rest.items() if isinstance(leaf, Atom)}
    bare_names = weights and not optimizers
    prefix = "" if bare_names else _model(tensors, paths, optimizers.values(), named)
    found = Arranged()
    model = _weights(found, tensors, prefix)
    for root, optimizer in optimizers.items():
        if optimizer.numbered and not (ordered or optimizer.tells_names):
            _keep(found, root, optimizer)
        else:
            _add(found, optimizer, model)
    values = [(paths[key], leaf) for key, leaf in rest.items() if not isinstance(leaf, Atom)]
    found.resume = _resume(files, found, nest(values), step)
    return found


def _model(
    tensors: Mapping[str, Atom],
    paths: Mapping[str, Path],
    optimizers: Iterable[Optimizer],
    named: bool,
) -> str | None:
    """Prefix of the model's keys, or ``None`` where an optimizer comes without its model."""
    stepped = {bare(name) for o in optimizers if not o.numbered for name, _ in o.states}
    if stepped:
        one, known = min(stepped), {bare(key) for key in tensors}
        ends = {key.removesuffix(one) for key in known if key.endswith(one)}
        fitting = [
            prefix
            for prefix in sorted(ends, key=len)
            if prefix[-1:] in ("", ".") and all(prefix + name in known for name in stepped)
        ]
        return fitting[0] if fitting else None
    if named:
        sections = Counter(key.partition(".")[0] + "." for key in tensors)
        sections.pop("rng.", None)
    else:
        sections = Counter(dotted((*paths[key][:-1], "")) for key in tensors)
    models = [s for s in sections if s.rstrip(".").rpartition(".")[2] in _MODELS]
    return max(models or sections, key=lambda section: sections[section], default="")


def _weights(found: Arranged, tensors: Mapping[str, Atom], prefix: str | None) -> dict[str, Atom]:
    """Name the weights, and return them by parameter name."""
    if prefix is None:
        found.remarks.append("the weights that the optimizer steps are not here")
        found.atoms |= {extra_key(key): atom for key, atom in tensors.items()}
        return {}
    inside = {key.removeprefix(prefix): a for key, a in tensors.items() if key.startswith(prefix)}
    names = {name: bare(name) for name in inside}
    if len({*names.values()}) < len(names):
        found.remarks.append("names of wrappers are kept, without them names would be the same")
        names = {name: name for name in inside}
    model = {names[name]: atom for name, atom in inside.items()}
    found.atoms |= {weight_key(name): atom for name, atom in model.items()}
    found.atoms |= {extra_key(k): a for k, a in tensors.items() if not k.startswith(prefix)}
    return model


def _keep(found: Arranged, root: str, optimizer: Optimizer) -> None:
    """Keep states that nobody can name."""
    for (index, state), atom in optimizer.states.items():
        found.atoms[extra_key(f"{root}state.{index}.{state}")] = atom
    found.remarks.append(
        f"{root}state is kept under the numbers of its parameters: the weights are not stored in the"
        " order of the model, and names cannot be told"
    )


def _add(found: Arranged, optimizer: Optimizer, model: Mapping[str, Atom]) -> None:
    """Add the states of an optimizer, and the hyper-parameters of its groups by name."""
    groups = [optimizer.groups[index] for index in sorted(optimizer.groups)]
    names = {name: _known(name, model) for name, _ in optimizer.states}
    if optimizer.numbered:
        try:
            names = _numbers(found, optimizer, groups, model)
        except CheckpointError as error:
            if optimizer.states:
                raise
            found.remarks.append(f"hyper-parameters are left out: {error.what}, {error.why}")
            return
    for (name, state), atom in optimizer.states.items():
        key = state_key(names.get(name, name), state)
        if key in found.atoms:
            raise CheckpointError(f"two optimizers have {key}")
        weight = model.get(names.get(name, name))
        found.atoms[key] = dataclasses.replace(atom, relation=relation(atom, weight))
    hyper = {name: dict(values) for name, values in found.resume.hyper.items()}
    for group in groups:
        values = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        for name in group.get("params", []):
            hyper.setdefault(names.get(str(name), _known(str(name), model)), {}).update(values)
    for name, values in optimizer.hyper.items():
        hyper.setdefault(names.get(name, _known(name, model)), {}).update(values)
    found.resume = dataclasses.replace(found.resume, hyper=hyper)


def _numbers(
    found: Arranged,
    optimizer: Optimizer,
    groups: Sequence[Mapping[str, Any]],
    model: Mapping[str, Atom],
) -> dict[str, str]:
    """Names of the parameters by their numbers."""
    by_index = names_by_index(groups, optimizer.shapes, distinct(model))
    if not optimizer.tells_names:
        found.remarks.append("the optimizer's numbers were matched with names by order and shape")
    return {str(index): _known(name, model) for index, name in by_index.items()}


def _known(name: str, model: Mapping[str, Atom]) -> str:
    """A parameter's name as the model has it."""
    return name if name in model else bare(name)


def _resume(files: Files, found: Arranged, values: Any, known: int | None) -> Resume:
    client: dict[str, Any] = values if isinstance(values, dict) else {}
    scheduler = _section(client, _SCHEDULERS)
    scaler = _section(client, _SCALERS)
    kept = {k: v for k, v in client.items() if k not in (*_SCHEDULERS, *_SCALERS)}
    counted = (client[name] for name in _STEPS if isinstance(client.get(name), int))
    step = next(counted, None) if known is None else known
    if step is None:
        step = _steps(files, found.atoms.items())
    return dataclasses.replace(
        found.resume, step=step, scheduler=scheduler, scaler=scaler, client=kept
    )


def _section(client: Mapping[str, Any], names: Sequence[str]) -> Mapping[str, Any]:
    found: Any = next((client[name] for name in names if name in client), {})
    if isinstance(found, list) and len(found) == 1:
        (found,) = found
    return found if isinstance(found, Mapping) else {"state": found}


def _steps(files: Files, atoms: Iterable[tuple[str, Atom]]) -> int | None:
    """Steps that the optimizer has counted for the first parameter that it has stepped."""
    for key, atom in atoms:
        if key.startswith("optim.") and key.endswith(".step") and math.prod(atom.shape) == 1:
            return int(number(files, atom))
    return None
