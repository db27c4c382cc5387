"""The policy that rotates queries and keys, and the contract that lets every attention heed it.

A policy gets queries and keys as they were projected, with the positions of their tokens, and turns
them as it likes: by the model's own rule, with positions divided by a ratio for every head, or with
frequencies picked request by request. Caches under a policy hold unrotated keys.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from core.attention import is_ours, register_attention, switch_attention
from core.contributions import MODEL, Phase, Transform
from core.equivalence import decoder, record, require_calls, require_equivalent
from core.errors import CoreError, ModelError
from core.rotary import Rotary
from core.rotation import Rotation, in_force
from core.tokens import RequestState, Tokens

if TYPE_CHECKING:
    from core.run import Run

ATTENTION = "core_positions"
"""Registered name of the attention that a policy brings to models with a stock one."""


@runtime_checkable
class Positions(Protocol):
    """A policy of positions. Keeps nothing about requests in itself, only in them.

    Attributes:
        name: short name.
        atomic_prefill: it must see a prompt in one piece, so an engine may neither cut the prompt
            into chunks nor take a prefix of it from a cache.

    Example::

        class Interpolated:
            name, atomic_prefill = "interpolated", False

            def __init__(self, ratio): self.ratio = ratio
            def digest(self): return str(self.ratio)
            def begin(self, module, query, key, visible, requests): pass
            def rotate(self, module, x, tokens):
                return tokens.rotate(module, x, tokens.positions / self.ratio)

        with positions(model, Interpolated(2.0)):
            model.generate(tokens)
    """

    @property
    def name(self) -> str: ...

    @property
    def atomic_prefill(self) -> bool: ...

    def digest(self) -> str:
        """Everything that changes what the policy does, as text, for the identity of caches."""
        ...

    def begin(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        visible: Tensor,
        requests: Sequence[RequestState],
    ) -> None:
        """Look at prompts before their first rotation; called once for each layer and prompt.

        Args:
            module: the attention module; ``module.layer_idx`` tells the layer.
            query: (R, H, 1, D) unrotated query of each prompt's last token.
            key: (R, Hkv, T, D) unrotated keys of the prompts.
            visible: (R, T) which keys that last token sees: no padding, nothing out of its window.
            requests: the R requests; decisions go into ``request.kept``.
        """
        ...

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        """Rotate queries or keys.

        Args:
            module: the attention module.
            x: (B, H, T, D), not rotated.
            tokens: where they stand and whose they are; ``tokens.rotate`` is the model's own way.

        Returns:
            The same shape; for keys also one with a head for every query head.
        """
        ...


class ModelPositions:
    """The model's own positions: changes nothing.

    Args:
        per_request: frequencies that depend on the length (longrope) are picked for each request by
            its own length, so that its text does not depend on its neighbours. By default they
            follow the longest row of the batch, as transformers does.

    Example:
        >>> ModelPositions().name
        'model'
    """

    name = "model"
    atomic_prefill = False

    def __init__(self, *, per_request: bool = False) -> None:
        self.per_request = per_request

    def digest(self) -> str:
        """Return how lengths are taken."""
        return "per request" if self.per_request else "per batch"

    def begin(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        visible: Tensor,
        requests: Sequence[RequestState],
    ) -> None:
        """Nothing is decided by the prompt."""

    def rotate(self, module: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
        """Rotate at the tokens' own positions."""
        lengths = [request.length for request in tokens.requests]
        if not self.per_request:
            lengths = [max(lengths)] * len(lengths)
        return tokens.rotate(module, x, lengths=lengths)


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

    For engines that keep a store of keys and apply a policy themselves.

    Raises:
        ModelError: as :func:`positions`.

    Example::

        with unrotated(model) as rotary:
            ...
    """
    rotary = Rotary.of(model)
    undo = rotary.replace()
    try:
        yield rotary
    finally:
        undo()


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
    if in_force(decoder(model)) is not None:
        raise ModelError(f"{type(model).__name__} already has a policy of positions in force")
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

    if kwargs.get("s_aux") is not None:
        raise ModelError(f"{type(module).__name__} has attention sinks", why="sdpa ignores them")
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, mask, **kwargs
    )
    return result
