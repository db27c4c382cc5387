"""What a run needs beside tensors, under the names of torch's flattened state dicts."""

from __future__ import annotations

from typing import Any

from core import Description
from core_ucp.view.view import View


def description(view: View) -> Description:
    """Step and plain values of a checkpoint, as ``run.load`` wants them.

    Hyper-parameters are ``optim.param_groups.<parameter>.<name>``; the schedule, the loss scaler and
    what the user has saved along keep their names.
    """
    resume = view.resume
    values: dict[str, Any] = {
        f"optim.param_groups.{parameter}.{name}": value
        for parameter, group in resume.hyper.items()
        for name, value in group.items()
    }
    for name in ("scheduler", "scaler", "counters"):
        if getattr(resume, name):
            values[name] = dict(getattr(resume, name))
    values |= {name: value for name, value in resume.client.items() if name not in values}
    return Description(step=resume.step or 0, values=values)
