"""Two that would run the attention of one live model are never both on it."""

from __future__ import annotations

import pytest
from torch import nn

from core.errors import ModelError
from core.owners import take


def test_a_taken_slot_is_refused_to_others_until_it_is_given_back() -> None:
    model = nn.Linear(2, 2)
    release = take(model, ["attention", "mlp"], "one")
    with pytest.raises(
        ModelError, match="the mlp of Linear is taken: one has it, and two wants it"
    ):
        take(model, ["loss", "mlp"], "two")
    release()
    take(model, ["loss", "mlp"], "two")()


def test_nothing_is_taken_where_one_slot_is_refused() -> None:
    model = nn.Linear(2, 2)
    take(model, ["mlp"], "one")
    with pytest.raises(ModelError):
        take(model, ["loss", "mlp"], "two")
    take(model, ["loss"], "three")


def test_one_owner_may_come_twice_and_gives_back_twice() -> None:
    model = nn.Linear(2, 2)
    first, second = (take(model, ["attention"], "engine") for _ in range(2))
    first()
    first()
    with pytest.raises(ModelError, match="engine has it"):
        take(model, ["attention"], "other")
    second()
    take(model, ["attention"], "other")


def test_other_models_are_free() -> None:
    take(nn.Linear(2, 2), ["attention"], "one")
    take(nn.Linear(2, 2), ["attention"], "two")
