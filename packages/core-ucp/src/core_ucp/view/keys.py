"""Names of atoms: the keys that DCP gives to the flattened state of a model and its optimizer."""

from __future__ import annotations

from typing import NamedTuple

MODEL = "model."
OPTIMIZER = "optim.state."
EXTRA = "extra."
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What wrappers of modules put into the names of parameters."""


class Part(NamedTuple):
    """What a key stands for.

    Attributes:
        parameter: name of the parameter, buffer, or extra tensor.
        state: name of the optimizer's state tensor, or an empty string for the weight itself.
    """

    parameter: str
    state: str


def weight_key(parameter: str) -> str:
    """Key of a parameter or buffer."""
    return MODEL + parameter


def state_key(parameter: str, state: str) -> str:
    """Key of a state tensor that an optimizer keeps for a parameter."""
    return f"{OPTIMIZER}{parameter}.{state}"


def extra_key(name: str) -> str:
    """Key of a tensor that is of neither: random numbers, positions in the data.

    A name that is such a key already, because a conversion has kept it, stays as it is.
    """
    return name if name.startswith(EXTRA) else EXTRA + name


def parse_key(key: str) -> Part | None:
    """What a key stands for, or ``None`` for an extra tensor."""
    if key.startswith(MODEL):
        return Part(key.removeprefix(MODEL), "")
    if key.startswith(OPTIMIZER):
        parameter, _, state = key.removeprefix(OPTIMIZER).rpartition(".")
        return Part(parameter, state)
    return None


def bare(parameter: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in WRAPPERS:
        parameter = parameter.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return parameter
