"""What a DeepSpeed run keeps beside tensors: schedule, scaler, counters, settings, client state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from core_ucp.files.pickles import Inert, Located
from core_ucp.sources.deepspeed.content import Content, Model, config_of
from core_ucp.sources.deepspeed.shares import number
from core_ucp.view.files import Files
from core_ucp.view.view import Resume

_OWN = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
    "shared_params",
    "lr_scheduler",
    "data_sampler",
    "random_ltd",
    "sparse_tensor_module_names",
    "skipped_steps",
    "global_steps",
    "global_samples",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_version",
    "universal_checkpoint_info",
    "num_experts",
    "ds_autoep_layers",
    "autoep_layers",
    "folding",
}
"""Keys of a file of model states that are DeepSpeed's; all others are the user's."""
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_NOTHING = object()


def read_resume(
    content: Content, model: Model, hyper: Mapping[str, Mapping[str, Any]], step: int | None
) -> tuple[Resume, dict[str, Located]]:
    """Everything that is no tensor, and the tensors of the client state by name.

    Args:
        content: of the checkpoint.
        model: a file of model states.
        hyper: settings of the optimizer by parameter name, as the files have them.
        step: of the optimizer.
    """
    counters = {
        key: value
        for key in _COUNTERS
        if isinstance(value := model.tree.get(key), int | float) and math.isfinite(value)
    }
    client, tensors, left = _client(model)
    if left:
        content.remarks.append(
            f"objects that the user has saved along are not read: {', '.join(sorted(left)[:8])}"
        )
    for key in ("data_sampler", "random_ltd"):
        if model.tree.get(key) is not None:
            content.remarks.append(f"the state of {key} is not carried over")
    if not hyper and content.optimizers:
        content.remarks.append("the settings of the optimizer are not saved by this kind of run")
    scheduler = plain(content.files, model.tree.get("lr_scheduler"))
    resume = Resume(
        step=step if step is not None else counted_steps(model),
        optimizer=optimizer_of(config_of(model.tree), hyper),
        hyper=_settings(content.files, hyper),
        scheduler=scheduler if isinstance(scheduler, dict) else {},
        scaler=_scaler(content, model),
        counters=counters,
        client=client,
    )
    return resume, tensors


def counted_steps(model: Model) -> int | None:
    """Steps that a run has made, without those that an overflow has skipped."""
    made, skipped = model.tree.get("global_steps"), model.tree.get("skipped_steps") or 0
    return made - skipped if isinstance(made, int) and isinstance(skipped, int) else None


def _client(model: Model) -> tuple[dict[str, Any], dict[str, Located], list[str]]:
    client: dict[str, Any] = {}
    tensors: dict[str, Located] = {}
    left: list[str] = []
    for key, value in model.tree.items():
        if key in _OWN:
            continue
        name = str(key)
        tensors |= dict(_tensors(value, name))
        kept = plain(None, value)
        if kept is not _NOTHING:
            client[name] = kept
        elif not isinstance(value, Located):
            left.append(name)
    return client, tensors, left


def _tensors(value: Any, name: str) -> list[tuple[str, Located]]:
    if isinstance(value, Located):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _tensors(item, f"{name}.{key}")]
    if isinstance(value, list | tuple):
        return [
            found for index, item in enumerate(value) for found in _tensors(item, f"{name}.{index}")
        ]
    return []


def plain(files: Files | None, value: Any) -> Any:
    """A value without objects, or a marker where it is one.

    Dictionaries and lists lose what is no plain value; tensors of one element become numbers where
    their files are given.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Located):
        if files is None or value.numel != 1 or value.dtype.is_complex:
            return _NOTHING
        return number(files, value, "a setting")
    if isinstance(value, Inert):
        if value.kind not in ("argparse.Namespace", "types.SimpleNamespace"):
            return _NOTHING
        return plain(files, value.state)
    if isinstance(value, Mapping):
        pairs = {str(key): plain(files, item) for key, item in value.items()}
        return {key: item for key, item in pairs.items() if item is not _NOTHING}
    if isinstance(value, list | tuple):
        items = [plain(files, item) for item in value]
        kept = [item for item in items if item is not _NOTHING]
        return kept if isinstance(value, list) else tuple(kept)
    return _NOTHING


def _settings(files: Files, hyper: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Settings by parameter name; those of one group are one object."""
    made: dict[int, dict[str, Any]] = {}
    for group in hyper.values():
        if id(group) not in made:
            kept = {key: plain(files, value) for key, value in group.items()}
            made[id(group)] = {
                str(key): value
                for key, value in kept.items()
                if key not in ("params", "step", "name", "moe") and value is not _NOTHING
            }
    return {name: made[id(group)] for name, group in hyper.items()}


def optimizer_of(config: Mapping[str, Any], hyper: Mapping[str, Mapping[str, Any]]) -> str:
    """Class of torch.optim that behaves as the optimizer of a run, where that is known."""
    section = config.get("optimizer")
    described = section if isinstance(section, Mapping) else {}
    name = str(described.get("type") or "")
    if name.lower() in ("adam", "adamw"):
        group = next(iter(hyper.values()), {})
        if isinstance(group.get("decoupled_weight_decay"), bool):
            return "AdamW" if group["decoupled_weight_decay"] else "Adam"
        params = described.get("params")
        decoupled = params.get("adam_w_mode", True) if isinstance(params, Mapping) else True
        return "AdamW" if name.lower() == "adamw" or decoupled else "Adam"
    return name


def _scaler(content: Content, model: Model) -> dict[str, Any]:
    """State of the loss scaler; a run that does not scale has none."""
    if content.optimizers:
        tree = content.optimizers[min(content.optimizers)].tree
        scaler = tree.get("loss_scaler")
        found = plain(None, scaler.state) if isinstance(scaler, Inert) else {}
        state = found if isinstance(found, dict) else {}
    else:
        saved = model.tree.get("optimizer")
        tree = saved if isinstance(saved, Mapping) else {}
        keys = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
        state = {key: tree[key] for key in keys if key in tree}
        if state:
            state["dynamic"] = bool(tree.get("dynamic_loss_scale"))
    scale = state.get("cur_scale", 1.0)
    off = not state.get("dynamic") and isinstance(scale, int | float) and math.isclose(scale, 1.0)
    return {} if not state or off else {str(key): value for key, value in state.items()}
