"""Who has taken which part of a live model: two that would run its attention are never both on it.

The plan of a run compares the claims of transforms. This compares what is active on a model, whoever
put it there: a transform, an engine, or a function that a user called.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

from torch import nn

from core.equivalence import decoder
from core.errors import ModelError

_owners: WeakKeyDictionary[nn.Module, dict[str, Counter[str]]] = WeakKeyDictionary()


def take(
    model: nn.Module, slots: Iterable[str], owner: str, *, fix: str = ""
) -> Callable[[], None]:
    """Take slots of a model, such as ``attention``, until the result is called.

    Args:
        model: a transformers model; slots belong to its text decoder.
        slots: what a transform would call its claims.
        owner: who takes them, for the message of the next one. One owner may take a slot repeatedly.
        fix: what to do when they are taken.

    Returns:
        What gives them back; calling it again does nothing.

    Raises:
        ModelError: for a slot that is taken, naming both sides.

    Example::

        release = take(model, ["attention"], "core-hello")
        release()
    """
    taken = _owners.setdefault(decoder(model), {})
    wanted = sorted(slots)
    for slot in wanted:
        for other in taken.get(slot, ()):
            if other != owner:
                raise ModelError(
                    f"the {slot} of {type(model).__name__} is taken",
                    why=f"{other} has it, and {owner} wants it",
                    fix=fix or f"end {other} on this model first",
                )
    for slot in wanted:
        taken.setdefault(slot, Counter())[owner] += 1
    held = list(wanted)

    def release() -> None:
        while held:
            owners = taken[held.pop()]
            owners[owner] -= 1
            owners += Counter()  # drops those at zero

    return release
