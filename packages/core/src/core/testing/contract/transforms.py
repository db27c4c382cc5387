"""Transforms: on every tiny model, or on a batch, they return the subject, once, and repeatably."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from core.contributions import BATCH, MODEL, Transform
from core.errors import ModelError, PlanError
from core.positions.install import ATTENTION
from core.testing import tiny
from core.testing.contract.check import Skip, checks_of, remark, require
from core.testing.contract.subject import Subject

Pair = tuple[Transform[nn.Module], Callable[..., nn.Module]]
"""A transform, and the builder of a tiny model that it accepts."""

CLAIMS = frozenset({"attention", "positions", "linear", "mlp", "loss", "embedding"})
"""The slots that core's own documentation names; others are possible."""

_refusals: WeakKeyDictionary[Subject, dict[tuple[str, str], str]] = WeakKeyDictionary()


def returns(subject: Subject) -> None:
    """A transform of models returns a module, for every tiny model that it does not refuse."""
    for transform, changed, name in _changed(subject):
        kind = type(changed).__name__
        require(isinstance(changed, nn.Module), f"{transform.name!r} turns {name} into a {kind}")


def batches(subject: Subject) -> None:
    """A transform of batches returns named tensors, the same ones for the same batch."""
    of_batches = [t for t in subject.transforms if t.stage == BATCH]
    if not of_batches:
        raise Skip("the plugin has no transform of batches")
    for transform in of_batches:
        results: list[Any] = [_apply_to_batch(subject, transform) for _ in range(2)]
        first, second = results
        good = isinstance(first, Mapping) and all(isinstance(v, Tensor) for v in first.values())
        require(good, f"{transform.name!r} returns no mapping of tensors")
        require(same(first, second), f"{transform.name!r} gives two results for one batch")


def twice(subject: Subject) -> None:
    """A second application to the same subject is refused."""
    for transform, build in _pairs(subject):
        with subject.run(enable=[f"{subject.name}.{transform.name}"]) as run:
            changed = run.apply(MODEL, build())
            try:
                run.apply(MODEL, changed)
            except PlanError:
                continue
        raise AssertionError(f"{transform.name!r} can be applied twice to one model")


def same_seed(subject: Subject) -> None:
    """The same seed gives the same weights and the same logits."""
    for transform, build in _pairs(subject):
        first, second = (apply(subject, transform, build()) for _ in range(2))
        what = f"{transform.name!r} on {type(first).__name__}"
        require(same(first.state_dict(), second.state_dict()), f"{what}: the weights differ")
        require(torch.equal(logits(first), logits(second)), f"{what}: the logits differ")


def claims(subject: Subject) -> None:
    """A transform changes attention, positions and embeddings only where it claims them."""
    for transform in subject.transforms:
        for slot in sorted(transform.claims - CLAIMS):
            remark(f"{transform.name!r} claims {slot!r}, which no package of core's uses")
    for transform, build in _pairs(subject):
        model = build()
        before = _slots(model)
        after = _slots(apply(subject, transform, model))
        if "positions" in transform.claims and after["attention"] == ATTENTION:
            # A policy brings it along: it computes what the stock one does.
            after["attention"] = before["attention"]
        taken = [s for s in before if before[s] != after[s] and s not in transform.claims]
        require(
            not taken,
            f"{transform.name!r} changes {' and '.join(taken)} of {type(model).__name__} "
            f"without claiming it; add claims=frozenset({set(taken)})",
        )


def state_dict(subject: Subject) -> None:
    """The state of a changed model loads into another one, which then computes the same."""
    for transform, build in _pairs(subject):
        first = apply(subject, transform, build(seed=0))
        second = apply(subject, transform, build(seed=1))
        what = f"{transform.name!r} on {type(first).__name__}"
        try:
            second.load_state_dict(first.state_dict())
        except RuntimeError as error:
            raise AssertionError(f"{what}: its state does not load: {error}") from None
        alike = torch.equal(logits(first), logits(second))
        require(alike, f"{what}: something that changes the logits is not in the state")


def apply(subject: Subject, transform: Transform[nn.Module], model: nn.Module) -> nn.Module:
    """Apply one transform under a fixed seed.

    Raises:
        ModelError: when it refuses the model.
    """
    with subject.run(enable=[f"{subject.name}.{transform.name}"]) as run:
        torch.manual_seed(0)
        return run.apply(MODEL, model)


def logits(model: nn.Module) -> Tensor:
    """Logits of a tiny model for a fixed batch."""
    inputs = {k: v for k, v in tiny.batch().items() if k != "labels"}
    with torch.no_grad():
        result: Tensor = model.eval()(**inputs, use_cache=False).logits
    return result


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two mappings hold equal tensors, bit for bit, under equal names."""
    if list(first) != list(second):
        return False
    pairs = [(value, second[name]) for name, value in first.items()]
    return all(_equal(a, b) for a, b in pairs)


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(left, right)


def pairs_of(subject: Subject, transforms: list[Transform[nn.Module]]) -> list[Pair]:
    """Every transform with every tiny model that it does not refuse.

    Raises:
        Skip: when there is no such pair, with the reasons of the refusals.
    """
    found: list[Pair] = []
    refusals: list[str] = []
    for transform in transforms:
        for name, build in tiny.MODELS.items():
            refusal = _refusal(subject, transform, name)
            if refusal:
                refusals.append(f"{transform.name!r} refuses {name}: {refusal}")
            else:
                found.append((transform, build))
    if not found:
        raise Skip("; ".join(refusals))
    return found


def _refusal(subject: Subject, transform: Transform[nn.Module], model: str) -> str:
    known = _refusals.setdefault(subject, {})
    key = transform.name, model
    if key not in known:
        try:
            apply(subject, transform, tiny.MODELS[model]())
            known[key] = ""
        except ModelError as error:
            known[key] = error.why or error.what
    return known[key]


def _pairs(subject: Subject) -> list[Pair]:
    of_models = [t for t in subject.transforms if t.stage == MODEL]
    if not of_models:
        raise Skip("the plugin has no transform of models")
    return pairs_of(subject, of_models)


def _changed(subject: Subject) -> Iterator[tuple[Transform[nn.Module], object, str]]:
    for transform, build in _pairs(subject):
        model = build()
        yield transform, apply(subject, transform, model), type(model).__name__


def _apply_to_batch(subject: Subject, transform: Transform[Any]) -> object:
    with subject.run(enable=[f"{subject.name}.{transform.name}"]) as run:
        torch.manual_seed(0)
        return run.apply(BATCH, tiny.batch())


def _slots(model: Any) -> dict[str, object]:
    """What tells by whom attention, positions and embedding of a model are done."""
    from core.equivalence import decoder

    inner: Any = decoder(model)
    rotary = [type(m).__name__ for n, m in inner.named_modules() if n.endswith("rotary_emb")]
    return {
        "attention": getattr(getattr(inner, "config", None), "_attn_implementation", ""),
        "positions": rotary,
        "embedding": type(inner.get_input_embeddings()).__name__,
    }


CHECKS = checks_of("transforms", returns, batches, twice, same_seed, claims, state_dict)
