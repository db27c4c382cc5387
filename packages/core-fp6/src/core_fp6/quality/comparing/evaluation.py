"""Measure what storing the weights of a language model in few bits does to what it says.

The measure is the divergence of the next-token distributions. Perplexity is shown as well, but
differences of the size that six bits make are noise in it: an error may just as well lower it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import nll_loss, pad

from core.errors import DataError, ModelError
from core_fp6.models.selecting import select
from core_fp6.progress import steps_bar
from core_fp6.quality.calibration import Calibration, evaluating
from core_fp6.quality.comparing.results import Comparison, Score
from core_fp6.quality.comparing.variants import DEFAULT, Variant, variant
from core_fp6.quality.searching import matrices
from core_fp6.weights.scaling import require_finite

_REFERENCE_BYTES = 1 << 30
"""Of the unquantized model's logits that are kept; what is beyond is computed again."""
_LOGITS = 1 << 24
"""Logits that are scored at a time."""
_ROUNDED = 1 << 22
"""Weights that are rounded at a time."""
_IGNORED = -100

Weights = Mapping[str, nn.Parameter]


def compare(
    model: nn.Module,
    ids: Tensor,
    *,
    variants: Sequence[str] = DEFAULT,
    calibration: Calibration | None = None,
    skip: Sequence[str] = (),
    batch_size: int = 1,
) -> Comparison:
    """Store the weights of a model in several ways, one after the other, and measure each.

    The weights are those that ``quantize`` would take, and the model computes with the values that
    are stored, in its own dtype: load it in float32 to see nothing but their error. There is never
    more in memory than the model, one variant of its weights and a gigabyte of logits. The model is
    left as it was, whatever happens.

    Args:
        model: a causal language model of transformers, not quantized.
        ids: int64 ``[sequences, length]`` of text that nothing was fitted to, as
            :func:`core_fp6.quality.calibration.tokenize` makes them; two tokens or more each.
        variants: names, see :func:`core_fp6.quality.comparing.variants.variant`.
        calibration: for the variants that need one.
        skip: modules to leave as they are, as for ``quantize``.
        batch_size: sequences at a time.

    Raises:
        SettingsError: when there is no variant of a name, or a pattern of ``skip`` matches nothing.
        ModelError: when there is nothing to quantize, or a weight has NaN or infinities.
        DataError: when a sequence has fewer than two tokens.
    """
    chosen = [variant(name) for name in dict.fromkeys(variants)]
    reasons = {v.name: v.missing(calibration is not None) for v in chosen}
    wanted = [v for v in chosen if reasons[v.name] is None]
    weights = {name: weight for name, _, weight in select(model, skip).weights()}
    _require_work(model, weights, ids)
    batches = torch.split(ids, batch_size)
    total = len(batches) * (1 + len(wanted)) + len(weights) * len(wanted)
    with evaluating(model) as device, steps_bar("compare", total) as done:
        text = _Text(model, [batch.to(device) for batch in batches], done)
        plain = text.score("unquantized", "as it is", _sizes_as_they_are(weights), {}, 0.0)
        scores = []
        for v in wanted:
            rounded, error = _round(weights, v, calibration, done)
            scores.append(text.score(v.name, v.family, _sizes(weights, v), rounded, error))
            del rounded
    return Comparison(
        model=type(model).__name__,
        tokens=ids.numel(),
        weights=sum(weight.numel() for weight in weights.values()),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        calibration_tokens=calibration.tokens if calibration is not None else 0,
        unquantized=plain,
        scores=tuple(scores),
        skipped={name: reason for name, reason in reasons.items() if reason is not None},
    )


def _require_work(model: nn.Module, weights: Weights, ids: Tensor) -> None:
    if not weights:
        raise ModelError(
            f"there is nothing to compare in {type(model).__name__}",
            why="no module of it would be quantized",
            fix="skip less, or give a model that is not quantized",
        )
    if ids.ndim != 2 or not len(ids) or ids.shape[1] < 2:
        raise DataError(
            f"token ids of shape {list(ids.shape)}",
            why="the next token is predicted: sequences have two tokens or more",
            fix="give [sequences, length]",
        )
    for name, weight in weights.items():
        require_finite(weight.detach(), name)


@dataclass
class _Text:
    """The text in batches, and the logits of the unquantized model as far as there is room."""

    model: nn.Module
    batches: list[Tensor]
    done: Callable[[str], None]
    _kept: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def score(
        self,
        name: str,
        family: str,
        sizes: tuple[float, int],
        weights: Mapping[str, Tensor],
        error: float,
    ) -> Score:
        """Run the text through the model with other weights."""
        sums = torch.zeros(3, dtype=torch.float64)
        for index, ids in enumerate(self.batches):
            reference = self._reference(index)
            logits = self._logits(ids, weights) if weights else reference
            sums += _compare(reference, logits, ids)
            self.done(name)
        positions = sum(ids.numel() for ids in self.batches)
        predicted = sum(ids[:, 1:].numel() for ids in self.batches)
        divergence, surprise, same = sums.tolist()
        return Score(
            name,
            family,
            *sizes,
            error,
            divergence / positions,
            exp(surprise / predicted),
            same / positions,
        )

    def _reference(self, index: int) -> Tensor:
        if index in self._kept:
            return self._kept[index]
        logits = self._logits(self.batches[index], {})
        if sum(kept.nbytes for kept in self._kept.values()) + logits.nbytes <= _REFERENCE_BYTES:
            self._kept[index] = logits.cpu()
        return logits

    def _logits(self, ids: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        # It exchanges the parameters for the time of the call, tied ones too, and puts them back.
        call = {"input_ids": ids, "use_cache": False}
        output: Any = functional_call(self.model, dict(weights), (), call)
        return cast(Tensor, output.logits)


def _compare(reference: Tensor, logits: Tensor, ids: Tensor) -> Tensor:
    """Sums over positions: divergence, surprise at the next token, and whether the guess is one."""
    following = pad(ids[:, 1:], (0, 1), value=_IGNORED).flatten()
    at_a_time = max(1, _LOGITS // logits.shape[-1])
    parts = zip(
        torch.split(reference.flatten(0, 1), at_a_time),
        torch.split(logits.flatten(0, 1), at_a_time),
        torch.split(following, at_a_time),
        strict=True,
    )
    sums = torch.zeros(3, dtype=torch.float64)
    for before, after, target in parts:
        p = before.to(after.device).float().log_softmax(-1)
        q = after.float().log_softmax(-1)
        more = q - p
        # Both sum to one, so this is the divergence, of terms that are all positive: the rounding
        # of float32 does not drown what small errors do.
        divergence = (p.exp() * (more.expm1() - more)).sum(dtype=torch.float64)
        surprise = nll_loss(q, target, ignore_index=_IGNORED, reduction="sum")
        same = (p.argmax(-1) == q.argmax(-1)).sum()
        sums += torch.stack([divergence, surprise.double(), same.double()]).cpu()
    return sums


def _round(
    weights: Weights, v: Variant, calibration: Calibration | None, done: Callable[[str], None]
) -> tuple[dict[str, Tensor], float]:
    """The values that a variant stores, and their mean relative error."""
    rounded: dict[str, Tensor] = {}
    errors = 0.0
    for name, weight in weights.items():
        importance = calibration.weights(name) if calibration is not None else None
        rounded[name], error = _round_one(weight.detach(), v, importance)
        errors += error
        done(v.name)
    return rounded, errors / len(weights)


def _round_one(weight: Tensor, v: Variant, importance: Tensor | None) -> tuple[Tensor, float]:
    """In pieces of whole rows, 64 or a multiple, so that blocks that cross rows stay whole."""
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    at_a_time = max(1, _ROUNDED // weight.shape[-1] // 64) * 64
    lost = whole = 0.0
    pairs = zip(matrices(weight, importance), matrices(result), strict=True)
    for (source, counts), (target, _) in pairs:
        pieces = (torch.split(each, at_a_time) for each in (source, target))
        for rows, place in zip(*pieces, strict=True):
            exact = rows.float()
            values = v.rounded(exact, counts)
            lost += float((values - exact).square().sum(dtype=torch.float64))
            whole += float(exact.square().sum(dtype=torch.float64))
            place.copy_(values)
    return result, (lost / whole) ** 0.5 if whole else 0.0


def _sizes(weights: Weights, v: Variant) -> tuple[float, int]:
    """Bits per weight, and bytes."""
    bits = sum(v.bits(weight.shape[-1]) * weight.numel() for weight in weights.values())
    return bits / sum(weight.numel() for weight in weights.values()), round(bits / 8)


def _sizes_as_they_are(weights: Weights) -> tuple[float, int]:
    size = sum(weight.nbytes for weight in weights.values())
    return 8 * size / sum(weight.numel() for weight in weights.values()), size
