"""What core itself promises to attention, positions and caches; for other plugins there is nothing."""

from __future__ import annotations

from typing import Any

import torch

from core.equivalence import decoder_layers, record, require_equivalent
from core.errors import ModelError
from core.identity import CacheIdentity, identity_of
from core.positions.install import positions
from core.positions.policy import ModelPositions
from core.softmax import Partial, attend, merge
from core.testing import tiny
from core.testing.contract.check import Skip, checks_of, require
from core.testing.contract.subject import Subject


def merge_is_exact(subject: Subject) -> None:
    """Attention merged from parts equals attention over all keys, gradients included."""
    _only_core(subject)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 4, 12, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    )
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    whole = attend(query, key, value, mask=mask)
    cuts = [(0, 5), (5, 6), (6, 12)]
    parts = [attend(query, key[:, :, a:b], value[:, :, a:b], mask=mask[:, a:b]) for a, b in cuts]
    merged = merge(*parts)
    require(torch.allclose(merged.output, whole.output, atol=1e-12), "merged outputs differ")
    require(torch.allclose(merged.lse, whole.lse, atol=1e-12), "merged log-sum-exps differ")
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        wanted, found = (_gradient(result, tensor) for result in (whole, merged))
        require(torch.allclose(wanted, found, atol=1e-12), f"the gradient of the {name} differs")


def positions_by_default(subject: Subject) -> None:
    """The model's own positions as a policy change neither logits nor generated tokens."""
    _only_core(subject)
    for build in tiny.MODELS.values():
        model: Any = build()
        before, ids = record(model), tiny.batch(rows=1)["input_ids"]
        wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
        with positions(model, ModelPositions()):
            require_equivalent(before, record(model))
            found = model.generate(ids, max_new_tokens=8, do_sample=False)
        kind = type(model).__name__
        require(torch.equal(wanted, found), f"{kind} generates other tokens under its own policy")


def change_is_noticed(subject: Subject) -> None:
    """The probe of a model accepts an unchanged one, and names the layer that was changed."""
    _only_core(subject)
    for build in tiny.MODELS.values():
        model = build()
        before = record(model)
        require_equivalent(before, record(model))
        with torch.no_grad():
            next(decoder_layers(model)[1].parameters()).add_(0.1)
        try:
            require_equivalent(before, record(model))
        except ModelError as error:
            require("layer 1" in str(error), f"the wrong layer is blamed: {error}")
        else:
            raise AssertionError(f"a changed {type(model).__name__} passes for the same")


def identity(subject: Subject) -> None:
    """Whatever changes keys or values changes the salt, and the order of names does not."""
    _only_core(subject)
    salts = {
        CacheIdentity().salt(),
        CacheIdentity(model="a").salt(),
        CacheIdentity(weights="a").salt(),
        CacheIdentity(adapter="a").salt(),
        CacheIdentity(modality={"a": "b"}).salt(),
        CacheIdentity(extras={"a": "b"}).salt(),
        CacheIdentity(extras={"ab": ""}).salt(),
        CacheIdentity().with_positions(ModelPositions()).salt(),
        CacheIdentity().with_positions(ModelPositions(per_request=True)).salt(),
        CacheIdentity().with_positions(ModelPositions(), regime="long").salt(),
    }
    require(len(salts) == 10, "two different identities have one salt")
    first, second = ({"a": "1", "b": "2"}, {"b": "2", "a": "1"})
    same = CacheIdentity(extras=first).salt() == CacheIdentity(extras=second).salt()
    require(same, "the order of extras changes the salt")
    for build in tiny.MODELS.values():
        _identity_of_models(build(), build())


def _identity_of_models(model: Any, same: Any) -> None:
    wider = tiny.build("Llama", intermediate_size=64)
    plain, kind = identity_of(model, "1").salt(), type(model).__name__
    require(plain == identity_of(same, "1").salt(), f"two equal {kind} have two salts")
    others = {plain, identity_of(model, "2").salt(), identity_of(wider, "1").salt()}
    with positions(model, ModelPositions()):
        others.add(identity_of(model, "1").salt())
    require(len(others) == 4, f"other weights, config or positions leave the salt of {kind}")
    require(plain == identity_of(model, "1").salt(), f"a lifted policy changes the salt of {kind}")


def _gradient(result: Partial, tensor: torch.Tensor) -> torch.Tensor:
    total = result.output.square().sum() + result.lse.sum()
    (found,) = torch.autograd.grad(total, tensor, retain_graph=True)
    return found


def _only_core(subject: Subject) -> None:
    if not subject.is_core:
        raise Skip("a promise of core's own")


CHECKS = checks_of("numerics", merge_is_exact, positions_by_default, change_is_noticed, identity)
