"""The probe of a model: does a change to it leave what it computes as it was?

Many architectures ignore a registered attention function, its mask or a replaced module without a
word, and then write wrong text. So a change is not believed but measured: record a few tokens
through the model before and after, compare layer by layer, and refuse by layer and reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ModelError

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Default tolerances by dtype of the logits, relative to the largest magnitude at a position."""

_SHORT = 24
_LONGEST = 1024


@dataclass(frozen=True)
class LayerTrace:
    """What one decoder layer did in a probe.

    Args:
        kind: class name of the layer.
        output: (B, T, width) on the CPU.
        attends: whether a module inside is an attention, by its class name.
        calls: how often a module inside called the counted attention function.
    """

    kind: str
    output: Tensor
    attends: bool
    calls: int


@dataclass(frozen=True)
class Trace:
    """What a model computed for the tokens of a probe.

    Args:
        model: class name of the model.
        tokens: (B, T) token ids.
        real: (B, T) false where a token is padding; padding is not compared.
        layers: the decoder layers in order.
        logits: (B, T, vocabulary) on the CPU; the last hidden states for a model without a head.
    """

    model: str
    tokens: Tensor
    real: Tensor
    layers: tuple[LayerTrace, ...]
    logits: Tensor = field(repr=False)

    @property
    def calls(self) -> int:
        """How often the counted attention function was called by decoder layers."""
        return sum(layer.calls for layer in self.layers)


def decoder(model: nn.Module) -> nn.Module:
    """Return the text decoder of a transformers model; the model itself if it has none inside."""
    found = getattr(model, "get_decoder", None)
    inner = found() if callable(found) else None
    return inner if isinstance(inner, nn.Module) else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Find the list of decoder layers.

    Raises:
        ModelError: when the model has no list of layers.
    """
    lists = [m for m in decoder(model).modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of decoder layers")
    wanted = getattr(_config(model), "num_hidden_layers", 0)
    # Outer lists come first, so a list of experts of the same length does not win.
    return next((found for found in lists if len(found) == wanted), max(lists, key=len))


def record(
    model: nn.Module,
    tokens: Tensor | None = None,
    *,
    real: Tensor | None = None,
    attention: str = "",
    length: int | None = None,
    seed: int = 0,
    run: Callable[[Tensor], Tensor] | None = None,
) -> Trace:
    """Run a few tokens through a model and keep the output of every decoder layer and the logits.

    Dropout is off, no gradient is kept, and training mode and random state are left as they were.

    Args:
        model: a transformers model with its weights.
        tokens: (B, T) ids; by default random ones, the second row padded on the left, long enough
            to leave a sliding window of up to 1000 tokens.
        real: (B, T) false at padding of the given ``tokens``.
        attention: count the calls of the attention function of this name.
        length: number of random tokens instead of the default.
        seed: seed of the random tokens.
        run: runs the given ``tokens`` through the model in another way and returns their logits
            (B, T, vocabulary). It may pack the rows into one, and split that into passes, as long as
            the tokens keep their order.

    Raises:
        ModelError: for a model without weights, without layers, or whose layers are not called.

    Example::

        before = record(model)
        change(model)
        require_equivalent(before, record(model))
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{type(model).__name__} has no weights yet", fix="load the weights first")
    if tokens is None:
        tokens, real = _left_padded(probe_tokens(model, length, seed))
    real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real.bool()
    layers = decoder_layers(model)
    outputs: list[list[Tensor]] = [[] for _ in layers]
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for layer, kept in zip(layers, outputs, strict=True):
            stack.callback(layer.register_forward_hook(partial(_keep, kept)).remove)
        stack.enter_context(_undisturbed(model))
        callers = stack.enter_context(counted(attention)) if attention else []
        inputs = {"input_ids": tokens.to(device), "attention_mask": real.long().to(device)}
        result = run(tokens) if run else model(**inputs, use_cache=False)
    times = Counter(id(caller) for caller in callers)
    rows = tokens.shape
    traces = [_trace(model, i, layers[i], outputs[i], times, rows) for i in range(len(layers))]
    logits = result if isinstance(result, Tensor) else _logits(result)
    return Trace(type(model).__name__, tokens.cpu(), real.cpu(), tuple(traces), logits.cpu())


def require_equivalent(before: Trace, after: Trace, tolerance: float | None = None) -> None:
    """Refuse a change that alters what the model computes.

    Args:
        before: the trace of the untouched model.
        after: the trace of the changed model for the same tokens.
        tolerance: largest difference, relative to the largest magnitude at the same position in
            the untouched model; by default that of the dtype in :data:`TOLERANCES`. Per position,
            because a few tokens of trained models have magnitudes that would hide all others.

    Raises:
        ModelError: naming the first layer that differs.

    Example::

        require_equivalent(before, record(model), tolerance=1e-5)
    """
    if not torch.equal(before.tokens, after.tokens) or not torch.equal(before.real, after.real):
        raise ValueError("the traces are of different tokens")
    if len(before.layers) != len(after.layers):
        counts = f"{len(before.layers)} layers before, {len(after.layers)} after"
        raise ModelError(f"{before.model} was changed", why=counts)
    if tolerance is None:
        tolerance = TOLERANCES.get(before.logits.dtype, TOLERANCES[torch.float32])
    for index, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        _compare(before, f"layer {index} ({old.kind})", old.output, new.output, tolerance)
    _compare(before, "the logits", before.logits, after.logits, tolerance)


def require_calls(trace: Trace, attention: str) -> None:
    """Refuse a model with an attention layer that never called the counted function.

    Args:
        trace: recorded with ``attention``.
        attention: the counted name, for the message.

    Raises:
        ModelError: naming the first layer that did not call it.
    """
    for index, layer in enumerate(trace.layers):
        if layer.attends and not layer.calls:
            raise ModelError(
                f"{trace.model} ignores the attention function {attention!r}",
                why=f"layer {index} ({layer.kind}) never calls it",
                fix="use a model whose attention goes through transformers' AttentionInterface",
            )
    if not trace.calls:
        raise ModelError(f"no layer of {trace.model} calls the attention function {attention!r}")


@contextmanager
def counted(name: str) -> Generator[list[nn.Module]]:
    """Collect the modules that call a registered attention function, one entry for every call.

    Raises:
        ModelError: for a name that is not registered.

    Example::

        with counted("sdpa") as callers:
            model(tokens)
        assert len(callers) == model.config.num_hidden_layers
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KNOWN

    if name not in KNOWN:
        raise ModelError(f"no attention function {name!r} is registered with transformers")
    function = KNOWN[name]
    callers: list[nn.Module] = []
    KNOWN.register(name, partial(_count, function, callers))
    try:
        yield callers
    finally:
        KNOWN.register(name, function)


def _count(
    function: Callable[..., Any], callers: list[nn.Module], module: nn.Module, *args: Any, **kw: Any
) -> Any:
    callers.append(module)
    return function(module, *args, **kw)


def _keep(kept: list[Tensor], module: nn.Module, args: Any, output: Any) -> None:
    hidden = output if isinstance(output, Tensor) else output[0]
    kept.append(hidden.detach().cpu())


def _trace(
    model: nn.Module,
    index: int,
    layer: nn.Module,
    kept: list[Tensor],
    times: Counter[int],
    rows: torch.Size,
) -> LayerTrace:
    kind = type(layer).__name__
    if not kept:
        raise ModelError(f"{type(model).__name__}: layer {index} ({kind}) is never called")
    inside = list(layer.modules())
    attends = any("Attention" in type(module).__name__ for module in inside)
    # A layer that was run chunk by chunk gave its output in pieces.
    output = torch.cat(kept, dim=1) if len(kept) > 1 else kept[0]
    if output.shape[:2] == (1, rows.numel()):
        output = output.view(*rows, -1)
    return LayerTrace(kind, output, attends, sum(times[id(module)] for module in inside))


def _logits(result: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(result, name, None), Tensor):
            return found
    why = f"a {type(result).__name__} has neither logits nor hidden states"
    raise ModelError("the model cannot be probed", why=why)


def _compare(trace: Trace, where: str, old: Tensor, new: Tensor, tolerance: float) -> None:
    what = f"{trace.model} computes something else: {where} differs"
    if old.shape != new.shape:
        raise ModelError(what, why=f"shape {tuple(old.shape)} became {tuple(new.shape)}")
    if old.shape[:2] == trace.real.shape:
        old, new = old[trace.real], new[trace.real]
    if not old.isfinite().all():
        raise ModelError(f"{trace.model} cannot be probed", why=f"{where} is not finite")
    precise = torch.promote_types(old.dtype, torch.float32)
    old, new = old.to(precise), new.to(precise)
    difference = (old - new).abs().flatten(1).amax(-1)
    limit = tolerance * old.abs().flatten(1).amax(-1).clamp_min(torch.finfo(precise).tiny)
    worst = int((difference / limit).nan_to_num(nan=torch.inf).argmax())
    if not difference[worst] <= limit[worst]:
        found = f"{difference[worst]:.3g} at most, tolerance {limit[worst]:.3g}"
        raise ModelError(what, why=f"by {found}")


@contextmanager
def _undisturbed(model: nn.Module) -> Generator[None]:
    """Evaluate without dropout and gradients; put modes and random state back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training


def probe_tokens(model: nn.Module, length: int | None = None, seed: int = 0) -> Tensor:
    """Draw (2, T) random token ids, long enough to leave a sliding window of up to 1000 tokens.

    Args:
        model: a transformers model.
        length: number of tokens instead of that.
        seed: seed of the tokens.
    """
    config = _config(model)
    if not length:
        spans = [getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size")]
        length = min(_SHORT + max(int(span or 0) for span in spans), _LONGEST)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, config.vocab_size, (2, length), generator=generator)


def _left_padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    real = torch.ones_like(tokens, dtype=torch.bool)
    # On the left: what a causal model sees is never on the right of it.
    real[1, : tokens.shape[1] // 3] = False
    return tokens, real


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"{type(model).__name__} is not a transformers model: it has no config")
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
