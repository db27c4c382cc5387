"""The probe: every kind of layer, in chunks and whole, forwards and backwards, on a few hundred tokens.

A layer that mixes tokens by other means than attention, shares keys with another one, or makes its own
mask runs in chunks without a complaint and computes something else. So every kind is measured before
anything is trained, with padding and with packed documents.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from core.equivalence import (
    TOLERANCES,
    Trace,
    decoder,
    probe_tokens,
    record,
    require_calls,
    require_equivalent,
)
from core.errors import CoreError, ModelError
from core_fpdt.layer.attention import NAME
from core_fpdt.masks.lazy import LazyMask
from core_fpdt.masks.tiles import Kind

if TYPE_CHECKING:
    from core_fpdt.layer.runner import Runner
    from core_fpdt.settings import FPDTSettings

_SHORTEST, _LONGEST = 203, 1024
_HALF = (torch.float16, torch.bfloat16)

Captured = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """What the probe found of one kind of layer.

    Args:
        layer: number of the first layer of this kind.
        kind: class of the layer.
        alike: number of layers of this kind.
        reason: why it cannot be run in chunks; empty if it can.
    """

    layer: int
    kind: str
    alike: int
    reason: str = ""


def probe(model: nn.Module, settings: FPDTSettings | None = None) -> list[Finding]:
    """Probe a model without leaving it changed.

    Args:
        model: a transformers decoder with its weights.
        settings: how it would be enabled.

    Returns:
        One finding for every kind of layer.

    Raises:
        ModelError: for a model that cannot be enabled at all.

    Example::

        assert not any(finding.reason for finding in probe(model))
    """
    from core_fpdt.enabling import enable

    probing = Probing(model)
    with enable(model, settings, strict=False) as enabled:
        return list(probing.findings(enabled.runner))


@dataclass(frozen=True)
class _Whole:
    """What a layer gave for one input, run as a whole.

    Args:
        hidden: (B, T, H) its input.
        grad: (B, T, H) gradient of its output, 0 at padding.
        results: output at real tokens, gradient of the input, gradients of parameters by name.
        steady: whether a second run gave the same.
    """

    hidden: Tensor
    grad: Tensor
    results: Mapping[str, Tensor]
    steady: bool


class Probing:
    """Made before a model is changed, asked after.

    Args:
        model: the model as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        from core.equivalence import decoder_layers

        self._model = model
        layers = decoder_layers(model)
        kinds: dict[Any, list[int]] = {}
        for index, layer in enumerate(layers):
            kinds.setdefault(_kind(layer), []).append(index)
        self._kinds = list(kinds.values())
        self._batches = _batches(model)
        self._layers = {same[0]: layers[same[0]] for same in self._kinds}
        self._probed = {index: _precise(model, layer) for index, layer in self._layers.items()}
        self._trace = record(model)
        self._wholes: dict[tuple[int, int], _Whole] = {}
        with _calm(model):
            for number, batch in enumerate(self._batches):
                captured = _capture(model, batch, self._layers)
                for index in self._layers:
                    self._wholes[index, number] = self._whole(index, captured[index], batch)

    def require_same(self, runner: Runner) -> None:
        """Refuse the model, which is enabled now, if anything of it computes something else.

        Raises:
            ModelError: naming the class of the layer and the reason.
        """
        for finding in self.findings(runner):
            if finding.reason:
                what = f"{type(self._model).__name__} cannot be run in chunks"
                raise ModelError(
                    what, why=f"layer {finding.layer} ({finding.kind}) {finding.reason}"
                )
        with _chunks_of(runner, self._trace.tokens.shape[1]):
            _require_whole_model(self._model, self._trace)

    def findings(self, runner: Runner) -> Iterator[Finding]:
        """Compare every kind of layer.

        Args:
            runner: what runs the layers of the model now.
        """
        length = self._batches[0]["input_ids"].shape[1]
        with _chunks_of(runner, length):
            reasons: dict[int, str] = {}
            for number, batch in enumerate(self._batches):
                try:
                    # Attention dropout and the like are refused here, as they are set.
                    captured = _capture(self._model, batch, self._layers, training=True)
                except CoreError as error:
                    reasons = dict.fromkeys(self._layers, f"is refused: {error}")
                    break
                except Exception as error:
                    reasons = dict.fromkeys(self._layers, _failure(error))
                    break
                if "position_ids" in batch:
                    runner.joins_documents = _joins(captured.values(), batch["position_ids"])
                with _calm(self._model):
                    for index in self._layers:
                        found = self._compare(index, number, captured[index], runner)
                        reasons[index] = reasons.get(index) or found
        for same in self._kinds:
            kind = type(self._layers[same[0]]).__name__
            yield Finding(same[0], kind, len(same), reasons[same[0]])

    def _whole(self, index: int, captured: Captured, batch: Mapping[str, Tensor]) -> _Whole:
        layer = self._probed[index]
        args, kwargs = captured if layer is self._layers[index] else _widened(captured)
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3:
            why = f"layer {index} ({type(layer).__name__}) takes no (batch, tokens, width)"
            raise ModelError(f"{type(self._model).__name__} cannot be run in chunks", why=why)
        generator = torch.Generator().manual_seed(index)
        hidden: Tensor = args[0].detach()
        grad = torch.randn(hidden.shape, generator=generator).to(hidden)
        grad = grad * batch["real"].to(grad).unsqueeze(-1)
        run = partial(_results, layer, hidden, args[1:], kwargs, grad, batch["real"])
        first, second = run(), run()
        steady = all(torch.allclose(first[n], second[n], rtol=1e-3, atol=1e-6) for n in first)
        return _Whole(hidden, grad, first, steady)

    def _compare(self, index: int, number: int, captured: Captured, runner: Runner) -> str:
        whole = self._wholes[index, number]
        if not whole.steady:
            return "draws random numbers beside dropout, which chunks would draw in another order"
        layer = self._probed[index]
        args, kwargs = captured if layer is self._layers[index] else _widened(captured)
        with ExitStack() as stack:
            if layer is not self._layers[index]:
                stack.callback(runner.attach(layer))
            try:
                found = _results(
                    layer, whole.hidden, args[1:], kwargs, whole.grad, self._batches[number]["real"]
                )
            except Exception as error:
                return _failure(error)
        return _difference(whole, found)


def _joins(captured: Iterable[Captured], places: Tensor) -> bool:
    """Whether a mask lets the second of two packed documents see the end of the first one."""
    begin = int((places[0] == 0).nonzero()[-1])
    leaves = (leaf for one in captured for leaf in pytree.tree_leaves(one))
    masks = [leaf for leaf in leaves if isinstance(leaf, LazyMask)]
    ends = (begin, begin + 1), (begin - 1, begin)
    return any(mask.tile(*ends).kind is not Kind.EMPTY for mask in masks)


def _failure(error: Exception) -> str:
    if LazyMask.__name__ in str(error):
        return "reads its mask by itself, which is not there as a tensor"
    return f"fails in chunks: {type(error).__name__}: {error}"


def _results(
    layer: nn.Module,
    hidden: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    grad: Tensor,
    real: Tensor,
) -> dict[str, Tensor]:
    """Output and gradients of a layer in training."""
    leaf = hidden.detach().clone().requires_grad_()
    named = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        output = layer(leaf, *args, **kwargs)
        output = output if isinstance(output, Tensor) else output[0]
        found: list[Tensor | None] = list(
            torch.autograd.grad(output, [leaf, *named.values()], grad.to(output), allow_unused=True)
        )
    results = {"its output": output.detach()[real.to(output.device)]}
    for name, gradient in zip(["its input", *named], found, strict=True):
        if gradient is not None:
            results[f"the gradient of {name}"] = gradient.detach()
    return results


def _difference(whole: _Whole, found: Mapping[str, Tensor]) -> str:
    wanted = whole.results
    if missing := sorted(set(wanted) ^ set(found)):
        return f"computes something else in chunks: {missing[0]} is there only once"
    # Norms and rotations of many models are float32 in float64 models, too.
    tolerance = max(TOLERANCES[whole.hidden.dtype], TOLERANCES[torch.float32])
    largest = max(float(t.abs().max()) for n, t in wanted.items() if "gradient" in n)
    for name, tensor in wanted.items():
        # What is 0 but for rounding, like the gradient of a bias of keys, has no size of its own.
        size = max(float(tensor.abs().max()), 1e-2 * largest)
        off = float((tensor - found[name]).abs().max()) / size
        if not off <= tolerance:
            return f"computes something else in chunks: {name} differs by {off:.2g} of its size"
    return ""


def _precise(model: nn.Module, layer: nn.Module) -> nn.Module:
    """A layer of 16-bit weights as a float32 copy, in which small differences are seen."""
    parameters = list(layer.parameters())
    if not parameters or any(p.dtype not in _HALF for p in parameters):
        return layer
    # Attention is looked up in the configuration, which stays that of the model.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return copy.deepcopy(layer, dict(configs)).float()


def _widened(captured: Captured) -> Captured:
    """What a layer was called with, in float32."""
    wide: Captured = pytree.tree_map_only(
        Tensor, lambda t: t.float() if t.dtype in _HALF else t, captured
    )
    return wide


def _batches(model: nn.Module) -> list[dict[str, Tensor]]:
    """One batch with padding on the left and on the right, one of packed documents."""
    config: Any = decoder(model).config
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    length = min(max(_SHORTEST, *(int(span or 0) + 75 for span in spans)), _LONGEST)
    device = next(model.parameters()).device
    tokens = probe_tokens(model, length).to(device)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, length - length // 5 :] = False
    real[1, : length // 3] = False
    padded = {"input_ids": tokens, "attention_mask": real.long(), "real": real}
    cut = length * 2 // 5
    places = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand(2, -1).to(device)
    packed = {"input_ids": tokens, "position_ids": places, "real": torch.ones_like(real)}
    return [padded, packed]


def _capture(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    layers: Mapping[int, nn.Module],
    *,
    training: bool = False,
) -> dict[int, Captured]:
    """What layers are called with, in a pass without a graph."""
    found: dict[int, Captured] = {}
    inputs = {name: value for name, value in batch.items() if name != "real"}
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        for index, layer in layers.items():
            keep = partial(_keep, found, index)
            stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        stack.callback(_restore_modes, modes)
        model.train(training or model.training)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            decoder(model)(**inputs, use_cache=False)
    for index, layer in layers.items():
        if index not in found:
            raise ModelError(f"layer {index} ({type(layer).__name__}) is never called")
    return found


def _keep(
    found: dict[int, Captured], index: int, _: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    found[index] = args, dict(kwargs)


@contextmanager
def _calm(model: nn.Module) -> Generator[None]:
    """Training mode without dropout: two ways of running a layer could not be compared with it."""
    modes = [(module, module.training) for module in model.modules()]
    old: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name, value in vars(module).items():
            of_module = "Dropout" in type(module).__name__ and name == "p"
            if isinstance(value, float) and (of_module or "drop" in name):
                old.append((module, name, value))
    try:
        for module, name, _ in old:
            setattr(module, name, 0.0)
        model.train()
        yield
    finally:
        for module, name, value in old:
            setattr(module, name, value)
        _restore_modes(modes)


def _restore_modes(modes: Sequence[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


@contextmanager
def _chunks_of(runner: Runner, length: int) -> Generator[None]:
    """Several ragged chunks in the few tokens of a probe."""
    old, runner.chunk = runner.chunk, max(1, length * 5 // 16)
    try:
        yield
    finally:
        runner.chunk = old


def _kind(layer: nn.Module) -> Any:
    """What tells kinds of layers apart: classes and plain attributes of all their modules."""
    return tuple(
        (name, type(module).__name__, tuple(sorted(_plain(module))))
        for name, module in layer.named_modules()
    )


def _plain(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        numbered = name in ("training", "layer_idx", "layer_id", "layer_number", "layer_index")
        if isinstance(value, bool | int | float | str) and not numbered:
            yield name, repr(value)


def _require_whole_model(model: nn.Module, before: Trace) -> None:
    after = record(model, attention=NAME)
    require_calls(after, NAME)
    require_equivalent(before, after)
