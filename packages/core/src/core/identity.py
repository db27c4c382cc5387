"""The identity of cached keys and values: everything that changes them, in one salt.

Two caches may share an entry only when every influence on its numbers is equal. What a package adds
to those influences goes into one field here, so that no cache has to know which packages exist.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

    from core.positions.policy import Positions

Pairs = tuple[tuple[str, str], ...]

_DOMAIN = b"core cache identity 1"


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What the keys and values of a cache depend on, besides the tokens.

    All values are strings, so that equal fields and equal salts are the same thing on every rank
    and in every process. Mappings may be given in any order.

    Args:
        model: which architecture and configuration.
        weights: version of the weights; changes with every update, and differs between all
            checkpoints of one architecture whose caches may meet.
        adapter: id and version of the adapter in force.
        positions: name of the policy that rotates queries and keys.
        positions_digest: the policy's own digest; see :meth:`with_positions`.
        regime: which set of rotary frequencies is in force, where a model has several.
        modality: rules by modality, such as ``{"image": "bidirectional"}``.
        extras: anything else, by names that its owner makes unique: ``{"hello.depth": "6"}``.

    Raises:
        TypeError: for a value that is not a string.

    Example:
        >>> first = CacheIdentity(weights="step-40", extras={"kv": "bf16", "hello.depth": "6"})
        >>> same = CacheIdentity(weights="step-40", extras={"hello.depth": "6", "kv": "bf16"})
        >>> first.salt() == same.salt()
        True
        >>> first.salt() == CacheIdentity(weights="step-41", extras=first.extras).salt()
        False
    """

    model: str = ""
    weights: str = ""
    adapter: str = ""
    positions: str = ""
    positions_digest: str = ""
    regime: str = ""
    modality: Mapping[str, str] | Pairs = ()
    extras: Mapping[str, str] | Pairs = ()

    def __post_init__(self) -> None:
        for name in ("modality", "extras"):
            object.__setattr__(self, name, _pairs(name, getattr(self, name)))
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str | tuple):
                raise TypeError(f"{field.name} must be a string, not {type(value).__name__}")

    def salt(self) -> str:
        """Digest of all fields as 64 hexadecimal digits; equal if and only if the fields are."""
        digest = hashlib.sha256(_DOMAIN)
        for field in sorted(fields(self), key=lambda field: field.name):
            value = getattr(self, field.name)
            parts = [value] if isinstance(value, str) else [text for pair in value for text in pair]
            # Name, number of strings and the length of each: no two identities read the same.
            digest.update(_text(field.name) + len(parts).to_bytes(8, "big"))
            digest.update(b"".join(_text(part) for part in parts))
        return digest.hexdigest()

    def with_positions(self, policy: Positions, regime: str = "") -> CacheIdentity:
        """Return this identity under a policy of positions."""
        digest = policy.digest()
        return replace(self, positions=policy.name, positions_digest=digest, regime=regime)


def identity_of(model: nn.Module, weights: str) -> CacheIdentity:
    """Return the identity of a model as it is now, with the policy of positions in force on it.

    Engines add what only they know, with :func:`dataclasses.replace`.

    Args:
        model: a transformers model.
        weights: version of its weights.

    Example::

        salt = identity_of(model, "step-40").salt()
    """
    from core.equivalence import decoder
    from core.positions.rotation import in_force

    identity = CacheIdentity(model=_digest_of(model), weights=weights)
    rotation = in_force(decoder(model))
    return identity if rotation is None else identity.with_positions(rotation.policy)


def _digest_of(model: nn.Module) -> str:
    """Digest of all but the weights: equal for equal models on every rank and in every process."""
    config: Any = getattr(model, "config", None)
    facts = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": config.to_dict() if hasattr(config, "to_dict") else repr(config),
        "attention": getattr(config, "_attn_implementation", None),
        # A model may be cast after its configuration was written.
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _pairs(name: str, value: Any) -> Pairs:
    items: list[Any] = list(cast(Any, value).items() if isinstance(value, Mapping) else value)
    for item in items:
        if not all(isinstance(text, str) for text in item):
            raise TypeError(f"{name} must map strings to strings, not {item!r}")
    if len({key for key, _ in items}) < len(items):
        raise ValueError(f"{name} has a key twice")
    return tuple(sorted(items))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "big") + encoded
