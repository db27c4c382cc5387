"""The call of an attention function: what a layer hands over, and what is done before and with it.

Whatever a caller of the model passes on reaches the attention function of most families as a keyword:
flags of the model's output beside arguments that change what must be computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from core.errors import ModelError
from core.positions.rotation import BATCH_ARGUMENT, in_force

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
"""``(module, query, key, value, mask, **kwargs)`` with (B, H, T, D) to output (B, T, H, Dv).

Arguments differ by family (``sliding_window``, ``softcap``, ``s_aux``): a function must honour or
refuse every one that asks for something; :func:`refuse_unknown` does the refusing.
"""

PLUMBING = frozenset(
    {
        BATCH_ARGUMENT,
        "cache_position",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)
"""Arguments that pass through an attention function and ask nothing of it."""

# Values that ask for nothing, of arguments that otherwise do.
_IDLE: Mapping[str, object] = {"dropout": 0.0, "is_causal": True}
_MEANINGS: Mapping[str, str] = {
    "dropout": "dropout of attention weights",
    "is_causal": "attention that is not causal",
    "s_aux": "attention sinks",
    "sliding_window": "a window",
    "softcap": "capped scores",
}


def refuse_unknown(
    module: nn.Module, kwargs: Mapping[str, Any], honours: frozenset[str] = frozenset()
) -> None:
    """Refuse every argument that an attention function would leave out of its computation.

    An argument passes where it is ``None``, plumbing, without effect (``dropout=0.0``) or honoured.

    Args:
        module: the attention module, for the message.
        kwargs: what the attention function was given.
        honours: names that the function acts on; ``sliding_window`` where its mask holds the window.

    Raises:
        ModelError: naming the argument and the class of the layer.

    Example::

        def forward(module, query, key, value, mask, **kwargs):
            refuse_unknown(module, kwargs, frozenset({"scaling", "sliding_window"}))
    """
    for name, value in kwargs.items():
        if value is None or name in PLUMBING or name in honours:
            continue
        if name in _IDLE and value == _IDLE[name]:
            continue
        meaning = f" ({_MEANINGS[name]})" if name in _MEANINGS else ""
        # Not type(): it would tell of the stand-in below.
        layer = module.__class__.__name__
        why = f"the attention function in place does not honour it{meaning}"
        raise ModelError(f"{layer} needs the attention argument {name!r}", why=why)


def rotate_then(
    forward: AttentionFunction,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Apply the policy of positions in force, if there is one, and attend.

    Raises:
        ModelError: for a backward pass that replays layers after its policy was taken out.
    """
    rotation = in_force(module)
    view: Any = module
    if rotation is not None:
        query, key = rotation.turn(module, query, key, attention_mask, kwargs)
        if key.shape[1] != value.shape[1]:
            # The policy gave every query head a key of its own.
            value = value.repeat_interleave(key.shape[1] // value.shape[1], dim=1)
            view = _Ungrouped(module)
    elif BATCH_ARGUMENT in kwargs:
        why = "its forward pass ran under a policy of positions that is no longer in force"
        fix = "run the backward pass inside the block too"
        raise ModelError(f"{type(module).__name__} cannot be replayed", why=why, fix=fix)
    kwargs.pop(BATCH_ARGUMENT, None)
    return forward(view, query, key, value, attention_mask, *args, **kwargs)


class _Ungrouped:
    """An attention module as seen by a function that must not repeat its key heads."""

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self._module)
