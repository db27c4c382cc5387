"""Replacing a model's attention: one registration, one switch, one proof that nothing changed.

transformers keeps attention functions and mask functions in two registries. A function without its
mask gets no mask at all, and a model that cannot switch says so in a log line only. What is here
registers both, switches the decoder, and measures the result with :mod:`core.equivalence`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn

from core.attention_call import AttentionFunction, refuse_unknown, rotate_then
from core.contributions import MODEL, Phase, Transform
from core.equivalence import decoder, record, require_calls, require_equivalent
from core.errors import CoreError, ModelError, PluginError

if TYPE_CHECKING:
    from core.run import Run

MaskFunction = Callable[..., Any]
"""As ``transformers.masking_utils.sdpa_mask``; what it returns is the function's ``mask``."""

__all__ = [
    "AttentionFunction",
    "AttentionSwitch",
    "MaskFunction",
    "attention",
    "is_ours",
    "refuse_unknown",
    "register_attention",
    "rotates_itself",
    "switch_attention",
    "use_attention",
]

logger = logging.getLogger("core")

# transformers acts on these wherever they occur in a name.
_MEANT_OTHERWISE = ("flash", "sdpa", "eager", "flex_attention")


class _Registered(NamedTuple):
    forward: AttentionFunction
    mask: MaskFunction
    function: AttentionFunction


_registered: dict[str, _Registered] = {}


def attention(
    name: str,
    forward: AttentionFunction,
    mask: MaskFunction,
    *,
    transform: str = "attention",
    rotates: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
    length: int | None = None,
) -> Transform[nn.Module]:
    """Make the transform that replaces a model's attention.

    When applied it registers both functions, switches the text decoder, and compares a few tokens
    with the attention before. A model that is refused is left as it was.

    Args:
        name: registered name; begins with the package's name, as the registries are global.
        forward: module-level attention function; it begins with :func:`refuse_unknown`. Where a
            policy of positions is in force, it gets queries and keys that the policy has rotated.
        mask: module-level mask function.
        transform: short name of the transform.
        rotates: the function gets unrotated queries and keys, and asks for the policy in force
            itself: ``in_force(module).turn(module, query, key, mask, kwargs)``, with the keyword
            arguments as they came. For stores that keep keys unrotated.
        verify: compare before and after.
        tolerance: see :func:`core.equivalence.require_equivalent`.
        length: number of tokens of the comparison; by default enough to leave a window of up to
            1000 tokens. A longer window is not reached unless this is.

    Raises:
        PluginError: for a name that transformers would take for another implementation.

    Example::

        yield attention("core_hello", chunked_attention, lazy_mask)
    """
    _check_name(name)
    apply = partial(
        _apply,
        name=name,
        forward=forward,
        mask=mask,
        rotates=rotates,
        verify=verify,
        tolerance=tolerance,
        length=length,
    )
    return Transform(
        stage=MODEL,
        name=transform,
        apply=apply,
        phase=Phase.KERNEL,
        claims=frozenset({"attention"}),
    )


def register_attention(
    name: str, forward: AttentionFunction, mask: MaskFunction, *, rotates: bool = False
) -> None:
    """Register an attention function with its mask function; doing it again changes nothing.

    Args:
        name: as for :func:`attention`.
        forward: as for :func:`attention`.
        mask: as for :func:`attention`.
        rotates: as for :func:`attention`.

    Raises:
        PluginError: for a name that another function has, or that transformers reads otherwise.

    Example::

        register_attention("core_hello", chunked_attention, lazy_mask)
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    _check_name(name)
    function = forward if rotates else partial(rotate_then, forward)
    new = _Registered(forward, mask, function)
    old = _registered.get(name)
    if old is not None and FUNCTIONS.get(name) is old.function and MASKS.get(name) is old.mask:
        if not all(_same(a, b) for a, b in zip(old, new, strict=True)):
            raise PluginError(f"another attention function is called {name!r}", fix="rename one")
        return
    if name in FUNCTIONS or name in MASKS:
        why = "somebody else registered it with transformers"
        raise PluginError(f"the attention name {name!r} is taken", why=why, fix="use another name")
    FUNCTIONS.register(name, function)
    MASKS.register(name, mask)
    _registered[name] = new


def is_ours(name: str) -> bool:
    """Tell whether an attention function was registered here, and so heeds positions."""
    return name in _registered


def rotates_itself(name: str) -> bool:
    """Tell whether an attention function was registered here with ``rotates``."""
    return is_ours(name) and _registered[name].function is _registered[name].forward


def switch_attention(model: nn.Module, name: str) -> Callable[[], None]:
    """Switch the text decoder to a registered attention function.

    Returns:
        What puts every configuration back as it was.

    Raises:
        ModelError: for a model that cannot switch, named by its class.

    Example::

        undo = switch_attention(model, "core_hello")
        undo()
    """
    inner = _switchable(model)
    old = [(config, config._attn_implementation) for config in _configs(inner.config)]
    undo = partial(_restore, old)
    try:
        inner.set_attn_implementation(name)
    except Exception as error:
        undo()
        raise ModelError(f"{type(model).__name__} refuses {name!r}", why=str(error)) from error
    return undo


class AttentionSwitch:
    """Switches the text decoder to a registered attention function and back, as often as wanted.

    For engines, which switch in every pass: it takes no more than a few assignments. What the model
    used before is looked up every time.

    Args:
        model: as for :func:`switch_attention`.
        name: as for :func:`switch_attention`.

    Raises:
        ModelError: as :func:`switch_attention`.

    Example::

        switch = AttentionSwitch(model, "core_hello")
        with switch:
            model(tokens)
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        undo = switch_attention(model, name)
        configs = _configs(cast(Any, decoder(model)).config)
        self._new = [(config, config._attn_implementation) for config in configs]
        self._old: list[tuple[Any, Any]] = []
        undo()

    def __enter__(self) -> None:
        self._old = [(config, config._attn_implementation) for config, _ in self._new]
        _restore(self._new)

    def __exit__(self, *_: object) -> None:
        _restore(self._old)


@contextmanager
def use_attention(model: nn.Module, name: str) -> Generator[None]:
    """Use a registered attention function inside a ``with`` block.

    Raises:
        ModelError: as :func:`switch_attention`.

    Example::

        with use_attention(model, "core_hello"):
            model(tokens)
    """
    undo = switch_attention(model, name)
    try:
        yield
    finally:
        undo()


def _apply(
    model: nn.Module,
    run: Run,
    *,
    name: str,
    forward: AttentionFunction,
    mask: MaskFunction,
    rotates: bool,
    verify: bool,
    tolerance: float | None,
    length: int | None,
) -> nn.Module:
    _switchable(model)
    register_attention(name, forward, mask, rotates=rotates)
    before = record(model, length=length) if verify else None
    undo = switch_attention(model, name)
    try:
        if before is not None:
            after = record(model, attention=name, length=length)
            require_calls(after, name)
            require_equivalent(before, after, tolerance)
    except CoreError:
        undo()
        raise
    except Exception as error:
        undo()
        why = f"{type(error).__name__}: {error}"
        raise ModelError(f"attention {name!r} fails in {type(model).__name__}", why=why) from error
    logger.info("attention: %s in %s", name, type(model).__name__)
    return model


def _switchable(model: nn.Module) -> Any:
    from transformers import PreTrainedModel

    name, inner = type(model).__name__, decoder(model)
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"the attention of {name} cannot be replaced", why="it is no transformers model"
        )
    # The public setter only logs what this tells.
    if not cast(Any, inner)._can_set_attn_implementation():
        why = f"{type(inner).__name__} does not use transformers' AttentionInterface"
        raise ModelError(f"the attention of {name} cannot be replaced", why=why)
    return inner


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if inner is not None:
            yield from _configs(inner)


def _restore(old: list[tuple[Any, Any]]) -> None:
    for config, name in old:
        # Not the public setter: it hands one name down to all inner configurations.
        config._attn_implementation_internal = name


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, partial) and isinstance(b, partial):
        return bool((a.func, a.args, a.keywords) == (b.func, b.args, b.keywords))
    return bool(a == b)


def _check_name(name: str) -> None:
    misread = [word for word in _MEANT_OTHERWISE if word in name]
    if misread or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        why = f"transformers reads {misread[0]!r} in it" if misread else "it is no plain name"
        raise PluginError(f"{name!r} cannot name an attention function", why=why)
