"""Putting a policy of positions in force on a model, and taking it out again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from core.attention import (
    is_ours,
    refuse_unknown,
    register_attention,
    rotates_itself,
    switch_attention,
)
from core.contributions import MODEL, Phase, Transform
from core.equivalence import decoder, record, require_calls, require_equivalent
from core.errors import CoreError, ModelError
from core.positions.policy import ModelPositions, Positions
from core.positions.rotary import Rotary, Unrotated
from core.positions.rotation import Rotation, in_force

if TYPE_CHECKING:
    from core.run import Run

ATTENTION = "core_positions"
"""Registered name of the attention that a policy brings to models with a stock one."""

# The mask holds the window.
_HONOURED = frozenset({"scaling", "dropout", "is_causal", "sliding_window"})


@contextmanager
def positions(
    model: nn.Module,
    policy: Positions,
    *,
    verify: bool = True,
    tolerance: float | None = None,
) -> Generator[None]:
    """Put a policy of positions in force inside a ``with`` block.

    Works in a plain forward pass and in ``model.generate`` with its cache and left padding; the
    cache holds unrotated keys. A cache filled before the block cannot be continued inside it, nor
    one filled inside after it.

    Args:
        model: a transformers model with a rotary embedding.
        policy: the policy.
        verify: prove first that taking rotations apart changes nothing, by running a few tokens
            with :class:`ModelPositions` against the untouched model.
        tolerance: see :func:`core.equivalence.require_equivalent`.

    Raises:
        ModelError: for a model without a rotary embedding (learned positions, ALiBi), with one of
            several dimensions, or one that rotates otherwise than all its layers suggest.

    Example::

        with positions(model, ModelPositions(per_request=True)):
            model.generate(tokens, attention_mask=real)
    """
    with _install(model, policy, verify, tolerance):
        yield


def positions_transform(
    name: str,
    factory: Callable[[nn.Module, Run], Positions],
    *,
    verify: bool = True,
    tolerance: float | None = None,
) -> Transform[nn.Module]:
    """Make the transform that puts a policy in force on a model for good.

    Args:
        name: short name of the transform.
        factory: module-level function that makes the policy.
        verify: as for :func:`positions`.
        tolerance: as for :func:`positions`.

    Example::

        yield positions_transform("positions", make_policy)
    """
    return Transform(
        stage=MODEL,
        name=name,
        apply=partial(_apply, factory=factory, verify=verify, tolerance=tolerance),
        phase=Phase.STRUCTURE,
        claims=frozenset({"positions"}),
    )


@contextmanager
def unrotated(model: nn.Module) -> Generator[Rotary]:
    """Let a model hand over unrotated queries and keys, and get its own rotation.

    For engines that keep a store of keys and apply a policy themselves, in an attention that is
    registered with ``rotates=True``. A pass with another attention is refused.

    Raises:
        ModelError: as :func:`positions`, and where a policy is in force already.

    Example::

        with unrotated(model) as rotary, use_attention(model, "core_hello"):
            ...
    """
    _refuse_nesting(model)
    rotary = Rotary.of(model)
    with ExitStack() as stack:
        stack.callback(rotary.replace())
        stack.callback(rotary.owner.register_forward_pre_hook(_rotates_itself).remove)
        yield rotary


def _apply(
    model: nn.Module,
    run: Run,
    *,
    factory: Callable[[nn.Module, Run], Positions],
    verify: bool,
    tolerance: float | None,
) -> nn.Module:
    _install(model, factory(model, run), verify, tolerance)
    return model


def _install(
    model: nn.Module, policy: Positions, verify: bool, tolerance: float | None
) -> ExitStack:
    """Put a policy in force; closing the result puts everything back."""
    _refuse_nesting(model)
    rotation = Rotation(ModelPositions(), Rotary.of(model))
    before = record(model) if verify else None
    with ExitStack() as stack:
        stack.callback(rotation.rotary.replace())
        stack.callback(rotation.attach(decoder(model)))
        name = _attention_name(model, stack)
        owner = rotation.rotary.owner
        stack.callback(owner.register_forward_pre_hook(_heeds_positions).remove)
        if before is not None:
            _prove(model, before, name, tolerance)
        rotation.policy = policy
        return stack.pop_all()


def _refuse_nesting(model: nn.Module) -> None:
    inner, name = decoder(model), type(model).__name__
    if in_force(inner) is not None:
        raise ModelError(f"{name} already has a policy of positions in force")
    if any(isinstance(module, Unrotated) for module in inner.modules()):
        raise ModelError(f"{name} already hands over unrotated queries and keys")


def _rotates_itself(owner: nn.Module, *_: Any) -> None:
    """Forward pre-hook: any other attention would attend without positions."""
    name = str(cast(Any, owner.config)._attn_implementation)
    if not rotates_itself(name):
        why = f"attention {name!r} does not rotate"
        fix = "use one that is registered with rotates=True"
        raise ModelError(f"{type(owner).__name__} hands over unrotated keys", why=why, fix=fix)


def _heeds_positions(owner: nn.Module, *_: Any) -> None:
    """Forward pre-hook: attention that was switched by hand would attend without any positions."""
    name = str(cast(Any, owner.config)._attn_implementation)
    if not is_ours(name):
        why = f"attention {name!r} does not heed the policy of positions in force"
        raise ModelError(f"{type(owner).__name__} was changed", why=why, fix="use core.attention")


def _attention_name(model: nn.Module, stack: ExitStack) -> str:
    """Make sure that an attention is in place that heeds the policy, and return its name."""
    config: Any = decoder(model).config
    current = str(config._attn_implementation)
    if is_ours(current):
        return current
    from transformers.masking_utils import sdpa_mask

    register_attention(ATTENTION, _attend, sdpa_mask)
    stack.callback(switch_attention(model, ATTENTION))
    return ATTENTION


def _prove(model: nn.Module, before: Any, name: str, tolerance: float | None) -> None:
    what = f"the positions of {type(model).__name__} cannot be replaced"
    try:
        after = record(model, attention=name)
        require_calls(after, name)
        require_equivalent(before, after, tolerance)
    except CoreError as error:
        raise ModelError(what, why=str(error)) from error
    except Exception as error:
        raise ModelError(what, why=f"{type(error).__name__}: {error}") from error


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers' sdpa does, and refuse what that would leave out."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    refuse_unknown(module, kwargs, _HONOURED)
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, mask, **kwargs
    )
    return result
