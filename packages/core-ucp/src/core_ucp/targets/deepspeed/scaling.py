"""The loss scaler: an object that DeepSpeed pickles, or numbers among others."""

from __future__ import annotations

from typing import Any

import torch

from core_ucp.files.new_pickles import Instance, Reference
from core_ucp.targets.deepspeed.options import DeepSpeedOptions
from core_ucp.view.view import View

_MODULE = "deepspeed.runtime.fp16.loss_scaler"
_DEFAULTS: dict[str, Any] = {
    "cur_scale": 65536.0,
    "cur_iter": 0,
    "last_overflow_iter": -1,
    "scale_factor": 2.0,
    "scale_window": 1000,
    "min_scale": 1.0,
    "delayed_shift": 2,
    "cur_hysteresis": 2,
    "consecutive_hysteresis": False,
    "raise_error_at_min_scale": True,
}
"""A dynamic scaler of DeepSpeed as it starts."""
_TORCH = {
    "scale": "cur_scale",
    "growth_factor": "scale_factor",
    "growth_interval": "scale_window",
}
"""What ``torch.amp.GradScaler`` calls the same numbers."""
_UNFUSED = ("last_overflow_iter", "scale_factor", "scale_window")


def scaler_state(view: View, options: DeepSpeedOptions) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Attributes of the target's loss scaler, and what a user should know about them."""
    if options.dtype != "fp16":
        return {"cur_scale": 1.0, "dynamic": False}, ()
    found = dict(view.resume.scaler)
    if not found:
        remark = "the source has no loss scaler: one starts at 65536 and finds its scale"
        return {**_DEFAULTS, "dynamic": True}, (remark,)
    if "scale" in found:
        return _from_torch(view, found), ("the loss scaler of torch goes on as one of DeepSpeed",)
    dynamic = bool(found.get("dynamic", "scale_window" in found))
    if not dynamic:
        return {"cur_scale": float(found["cur_scale"]), "dynamic": False}, ()
    kept = {key: found.get(key, default) for key, default in _DEFAULTS.items()}
    return {**kept, "dynamic": True}, ()


def _from_torch(view: View, found: dict[str, Any]) -> dict[str, Any]:
    named = {ours: found[theirs] for theirs, ours in _TORCH.items() if theirs in found}
    done = int(view.resume.step or 0)
    # Steps since the last overflow decide when the scale grows; torch counts them as a tracker.
    since = int(found.get("_growth_tracker", 0))
    counted = {"cur_iter": done, "last_overflow_iter": done - since - 1}
    return {**_DEFAULTS, **named, **counted, "dynamic": True}


def scaler_object(state: dict[str, Any]) -> Instance:
    """The object that stages 1 to 3 keep."""
    if not state["dynamic"]:
        return Instance(Reference(_MODULE, "LossScaler"), state)
    return Instance(Reference(_MODULE, "DynamicLossScaler"), {**state, "dtype": torch.float16})


def scaler_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """What the optimizer of stage 0 keeps."""
    numbers = {
        "dynamic_loss_scale": state["dynamic"],
        "cur_scale": state["cur_scale"],
        "cur_iter": state.get("cur_iter", 0),
    }
    return numbers | {key: state[key] for key in _UNFUSED if state["dynamic"]}
