"""Transforms that claim attention or positions: they compute what the model computes, and say which."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.contributions import MODEL, Transform
from core.equivalence import decoder, record, require_calls, require_equivalent
from core.errors import CoreError, ModelError
from core.identity import CacheIdentity
from core.positions.policy import Positions
from core.positions.rotation import in_force
from core.testing import tiny
from core.testing.contract.check import Skip, checks_of, require
from core.testing.contract.subject import Subject
from core.testing.contract.transforms import apply, pairs_of

_TOLERANCE = 1e-3


def equivalent(subject: Subject) -> None:
    """Replaced attention computes the same in every layer, with padding and with a window."""
    for transform, build in pairs_of(subject, _claiming(subject, "attention")):
        before = record(build())
        try:
            require_equivalent(before, record(apply(subject, transform, build())))
        except ModelError as error:
            raise AssertionError(f"{transform.name!r}: {error}") from None


def called(subject: Subject) -> None:
    """Every attention layer calls the function that the transform put in its place."""
    for transform, build in pairs_of(subject, _claiming(subject, "attention")):
        changed = apply(subject, transform, build())
        config: Any = decoder(changed).config
        name = str(config._attn_implementation)
        stock: Any = decoder(build()).config
        what = f"{transform.name!r} claims attention, and {type(changed).__name__}"
        require(name != stock._attn_implementation, f"{what} still uses {name!r}")
        try:
            require_calls(record(changed, attention=name), name)
        except ModelError as error:
            raise AssertionError(f"{transform.name!r}: {error}") from None


def gradients(subject: Subject) -> None:
    """Gradients through replaced attention are those of the model, unless it refuses them."""
    refusals = []
    pairs = pairs_of(subject, _claiming(subject, "attention"))
    for transform, build in pairs:
        try:
            found = _gradients(apply(subject, transform, build()))
        except CoreError as error:
            refusals.append(f"{transform.name!r}: {error.what}")
            continue
        for name, wanted in _gradients(build()).items():
            what = f"{transform.name!r} on {build.__name__}: the gradient of {name}"
            require(name in found, f"{what} is missing")
            limit = _TOLERANCE * float(wanted.abs().max())
            worst = float((found[name] - wanted).abs().max())
            require(worst <= limit, f"{what} differs by {worst:.3g}, tolerance {limit:.3g}")
    if len(refusals) == len(pairs):
        raise Skip("; ".join(dict.fromkeys(refusals)))


def policy(subject: Subject) -> None:
    """Replaced positions are a policy in force, with a digest that enters the cache identity."""
    for transform, build in pairs_of(subject, _claiming(subject, "positions")):
        first, second = (_policy(apply(subject, transform, build()), transform) for _ in range(2))
        for found in (first, second):
            digest: Any = found.digest()
            text = f"the policy of {transform.name!r}"
            require(isinstance(digest, str), f"{text} has a digest that is no string")
            require(found.name, f"{text} has no name")
        same = first.digest() == second.digest()
        require(same, f"{transform.name!r}: equal settings give two digests of the policy")
        salts = {CacheIdentity().salt(), CacheIdentity().with_positions(first).salt()}
        require(len(salts) == 2, f"{transform.name!r} does not change the cache identity")


def finite(subject: Subject) -> None:
    """A model with replaced positions computes finite logits, and generates with its cache."""
    for transform, build in pairs_of(subject, _claiming(subject, "positions")):
        model: Any = apply(subject, transform, build())
        what = f"{transform.name!r} on {type(model).__name__}"
        finite = all(bool(layer.output.isfinite().all()) for layer in record(model).layers)
        require(finite, f"{what}: a layer is not finite")
        ids = tiny.batch(rows=1)["input_ids"]
        made = model.generate(ids, max_new_tokens=4, do_sample=False)
        require(made.shape[1] == ids.shape[1] + 4, f"{what} does not generate")


def _policy(model: nn.Module, transform: Transform[nn.Module]) -> Positions:
    rotation = in_force(decoder(model))
    if rotation is None:
        raise AssertionError(
            f"{transform.name!r} claims positions, and no policy is in force; "
            "make it with core.positions.install.positions_transform"
        )
    return rotation.policy


def _claiming(subject: Subject, slot: str) -> list[Transform[nn.Module]]:
    found = [t for t in subject.transforms if t.stage == MODEL and slot in t.claims]
    if not found:
        raise Skip(f"no transform of the plugin claims {slot!r}")
    return found


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.enable_grad():
        model(**tiny.batch(), use_cache=False).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


CHECKS = checks_of("attention", equivalent, called, gradients, policy, finite)
